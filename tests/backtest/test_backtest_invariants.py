"""Invariants of every backtest under random settings, and the absence of look-ahead."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_market import score_table

from qtorch.backtest import LongShortStrategy, TopkDropoutStrategy, WeightStrategy, backtest
from qtorch.data.source.frame import FrameSource

SPAN = ("2019-02-01", "2019-05-31")

topk_settings = st.fixed_dictionaries(
    {
        "topk": st.integers(1, 12),
        "n_drop": st.integers(0, 6),
        "hold_thresh": st.integers(0, 6),
        "only_tradable": st.booleans(),
        "forbid_all_trade_at_limit": st.booleans(),
        "method_sell": st.sampled_from(["bottom", "random"]),
        "method_buy": st.sampled_from(["top", "random"]),
        "risk_degree": st.sampled_from([0.3, 0.95, 1.0]),
    }
)
exchange_settings = st.fixed_dictionaries(
    {
        "deal_price": st.sampled_from(["close", "open", ("high", "low")]),
        "limit_threshold": st.sampled_from(["none", 0.02, 0.05]),
        "trade_unit": st.sampled_from([None, 1, 100]),
        "open_cost": st.sampled_from([0.0, 0.0015, 0.05]),
        "close_cost": st.sampled_from([0.0, 0.0025, 0.05]),
        "min_cost": st.sampled_from([0.0, 5.0, 500.0]),
        "impact_cost": st.sampled_from([0.0, 0.1]),
        "volume_threshold": st.sampled_from([None, ("cum", "0.01*$volume")]),
    }
)
few_examples = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def check_invariants(result, exchange, market, *, short=False):
    report, positions, orders = result.report, result.positions, result.orders
    np.testing.assert_allclose(report["account"], report["value"] + report["cash"], rtol=1e-12)
    position_value = (positions["amount"] * positions["price"]).groupby(level=0).sum()
    np.testing.assert_allclose(
        report["value"], position_value.reindex(report.index).fillna(0.0), rtol=1e-12, atol=1e-6
    )
    assert (report["cash"] >= 0).all()
    if not short:
        assert (positions["amount"] > 0).all()
    np.testing.assert_allclose(report["total_cost"].iloc[-1], orders["cost"].sum(), rtol=1e-12)
    np.testing.assert_allclose(report["total_turnover"].iloc[-1], orders["value"].sum(), rtol=1e-12)
    # Compounding the returns less the costs reproduces the account.
    growth = (1 + report["return"] - report["cost"]).cumprod() * report["account"].iloc[0]
    growth /= 1 + report["return"].iloc[0] - report["cost"].iloc[0]
    np.testing.assert_allclose(report["account"], growth, rtol=1e-9)
    executed_orders = orders[orders["deal_amount"] > 0]
    assert (executed_orders["deal_amount"] <= executed_orders["amount"] * (1 + 1e-9)).all()
    bars = (
        market.features("all", ["$close", "$change"], *SPAN)
        .swaplevel()
        .reindex(executed_orders.index)
    )
    assert bars["$close"].notna().all()
    limit = exchange["limit_threshold"]
    if limit != "none":
        buying = executed_orders["direction"] == "buy"
        close_before = bars["$close"] / (1 + bars["$change"])
        move = executed_orders["price"] / close_before - 1
        assert not (move[buying] >= limit + 1e-6).any()
        assert not (move[~buying] <= -limit - 1e-6).any()
    result.check()


@pytest.mark.slow
@few_examples
@given(strategy=topk_settings, exchange=exchange_settings)
def test_topk_dropout_invariants(strategy, exchange, synthetic_market, random_scores):
    result = backtest(
        *SPAN,
        TopkDropoutStrategy(signal=random_scores, **strategy),
        account=1e6,
        exchange_kwargs=exchange,
        source=synthetic_market,
    )
    check_invariants(result, exchange, synthetic_market)
    assert result.positions.groupby(level=0).size().max() <= strategy["topk"]


@pytest.mark.slow
@few_examples
@given(exchange=exchange_settings, risk=st.sampled_from([0.5, 1.0]), seed=st.integers(0, 9))
def test_weight_strategy_invariants(exchange, risk, seed, synthetic_market):
    random = np.random.default_rng(seed)
    names = sorted(synthetic_market.instruments("stocks"))
    days = synthetic_market.calendar("2019-01-20", "2019-05-31")[:: 1 + seed % 3]
    weights = pd.DataFrame(random.random((len(days), len(names))), index=days, columns=names)
    weights = weights.where(random.random(weights.shape) > 0.5)
    weights = weights.div(weights.sum(axis=1), axis=0)
    strategy = WeightStrategy(signal=weights, risk_degree=risk)
    result = backtest(
        *SPAN, strategy, account=1e6, exchange_kwargs=exchange, source=synthetic_market
    )
    check_invariants(result, exchange, synthetic_market)


@pytest.mark.slow
@few_examples
@given(exchange=exchange_settings, topk=st.integers(1, 10), rebalance=st.integers(1, 5))
def test_long_short_invariants(exchange, topk, rebalance, synthetic_market, random_scores):
    strategy = LongShortStrategy(signal=random_scores, topk=topk, rebalance=rebalance)
    result = backtest(
        *SPAN, strategy, account=1e6, exchange_kwargs=exchange, source=synthetic_market
    )
    check_invariants(result, exchange, synthetic_market, short=True)


@pytest.mark.slow
def test_many_columns_equal_single_runs(synthetic_market, random_scores):
    random = np.random.default_rng(0)
    columns = {
        f"m{k}": random_scores + random.standard_normal(len(random_scores)) for k in range(4)
    }
    frame = pd.DataFrame(columns)
    frame.iloc[: len(frame) // 3, 1] = np.nan  # a member whose scores start later
    kwargs = {"topk": 6, "n_drop": 2, "hold_thresh": 2, "risk_degree": 1.0}
    setup = {"account": 1e6, "source": synthetic_market, "benchmark": "MARKET"}
    result = backtest(*SPAN, TopkDropoutStrategy(signal=frame, **kwargs), **setup)
    assert result.members == list(frame.columns)
    assert result.report.columns.names[0] == "member"
    for name in frame:
        single = backtest(*SPAN, TopkDropoutStrategy(signal=frame[name], **kwargs), **setup)
        pd.testing.assert_frame_equal(result[name].report, single.report, check_exact=True)
        pd.testing.assert_frame_equal(result.report[name], single.report, check_exact=True)
        for part in ("positions", "orders", "indicators"):
            frame_of_all, frame_of_single = getattr(result[name], part), getattr(single, part)
            pd.testing.assert_frame_equal(
                frame_of_all.reset_index(),
                frame_of_single.reset_index(),
                check_exact=True,
                check_categorical=False,
            )


@pytest.mark.parametrize("strategy", [TopkDropoutStrategy, LongShortStrategy, WeightStrategy])
def test_past_results_do_not_depend_on_future_data(strategy, synthetic_market, random_scores):
    cut = pd.Timestamp("2019-04-10")
    frame = synthetic_market.features(
        "all", [f"${f}" for f in synthetic_market.fields()]
    ).swaplevel()
    frame.columns = [c.lstrip("$") for c in frame.columns]
    is_future = frame.index.get_level_values(0) > cut
    random = np.random.default_rng(0)
    changed_frame = frame.astype(float)
    noise = 1 + 0.5 * random.random((int(is_future.sum()), 5))
    changed_frame.loc[is_future, ["open", "high", "low", "close", "volume"]] *= noise
    scores, changed_scores = random_scores, random_scores.copy()
    if strategy is WeightStrategy:
        scores = random_scores.abs() / random_scores.abs().groupby(level=0).transform("sum")
        changed_scores = scores.copy()
        kwargs = {}
    else:
        kwargs = {"topk": 5} | ({"n_drop": 2} if strategy is TopkDropoutStrategy else {})
    is_changed = (
        changed_scores.index.get_level_values(0) >= cut
    )  # scores of the cut day are traded the next day
    changed_scores[is_changed] = changed_scores[is_changed].to_numpy()[::-1]
    if strategy is WeightStrategy:
        changed_scores /= changed_scores.groupby(level=0).transform("sum")
        changed_scores[~is_changed] = scores[~is_changed]

    def run(bars, signal):
        return backtest(
            *SPAN,
            strategy(signal=signal, **kwargs),
            account=1e6,
            benchmark="MARKET",
            exchange_kwargs={"limit_threshold": 0.05},
            source=FrameSource(bars.sort_index()),
        )

    original, perturbed = run(frame, scores), run(changed_frame, changed_scores)
    for part in ("report", "positions", "orders"):
        expected, actual = getattr(original, part), getattr(perturbed, part)
        pd.testing.assert_frame_equal(expected.loc[:cut], actual.loc[:cut], check_exact=True)
    assert not original.report.loc[cut:].iloc[1:].equals(perturbed.report.loc[cut:].iloc[1:])


def test_perfect_scores_win_and_noise_loses_its_costs(synthetic_market):
    close = synthetic_market.features("stocks", ["Ref($close,-2)/Ref($close,-1)-1"]).iloc[:, 0]
    perfect = close.swaplevel().dropna().sort_index().rename("perfect")
    random = np.random.default_rng(0)
    frame = pd.DataFrame({"perfect": perfect})
    for k in range(20):
        frame[f"noise{k}"] = random.standard_normal(len(frame))
        frame[f"mixed{k}"] = perfect + perfect.std() * random.standard_normal(len(frame))
    costs = {"open_cost": 0.001, "close_cost": 0.001, "min_cost": 0.0, "trade_unit": None}
    setup = {"account": 1e6, "source": synthetic_market}
    strategy = TopkDropoutStrategy(signal=frame, topk=5, n_drop=5, risk_degree=1.0)
    with_costs = backtest(*SPAN, strategy, exchange_kwargs=costs, **setup)
    no_costs = dict.fromkeys(("open_cost", "close_cost", "min_cost"), 0.0) | {"trade_unit": None}
    without_costs = backtest(*SPAN, strategy, exchange_kwargs=no_costs, **setup)
    final = with_costs.report.xs("account", axis=1, level=1).iloc[-1]
    assert final.idxmax() == "perfect"
    noise = [f"noise{k}" for k in range(20)]
    assert final[noise].max() < final[[f"mixed{k}" for k in range(20)]].min()
    # Without costs, noise earns about the market's return; with costs, it loses what it paid.
    costs_paid = with_costs.report.xs("cost", axis=1, level=1)[noise].sum()
    gross = without_costs.report.xs("return", axis=1, level=1)[noise].sum()
    net = (
        with_costs.report.xs("return", axis=1, level=1)[noise]
        - with_costs.report.xs("cost", axis=1, level=1)[noise]
    ).sum()
    market = synthetic_market.features("stocks", ["$close/Ref($close,1)-1"], *SPAN).iloc[:, 0]
    average = market.groupby(level=1).mean().sum()
    spread = gross.std() / np.sqrt(20)
    assert abs(gross.mean() - average) < 3.5 * spread
    assert (gross - net).mean() == pytest.approx(costs_paid.mean(), rel=0.05)


def test_scores_are_traded_on_the_next_day(days):
    from small_market import bars

    source = bars({"A": [10, 20, 20, 20], "B": [10, 10, 30, 30]})
    scores = score_table({"A": [1, 0, 0], "B": [0, 1, 1]}, days)
    result = backtest(
        strategy=TopkDropoutStrategy(signal=scores, topk=1, n_drop=1),
        account=1e4,
        source=source,
        exchange_kwargs={"trade_unit": None},
    )
    # A's score of the first day buys it on the second day, after its price has risen.
    purchases = result.orders.query("direction == 'buy'").index.tolist()
    assert purchases == [(days[1], "A"), (days[2], "B")]
