"""Target weights, long-short portfolios, and enhanced indexing."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize
from small_market import bars, score_table

from qtorch.backtest import (
    EnhancedIndexingStrategy,
    Exchange,
    LongShortStrategy,
    SoftTopkStrategy,
    WeightStrategy,
    WeightStrategyBase,
    backtest,
)
from qtorch.backtest.enhanced_indexing import EnhancedIndexingOptimizer, _align_factors
from qtorch.core.errors import ConfigError, DataError

NO_COSTS = {"open_cost": 0.0, "close_cost": 0.0, "min_cost": 0.0, "trade_unit": None}


def run(strategy, source, **exchange):
    return backtest(
        strategy=strategy, account=1e4, source=source, exchange_kwargs=NO_COSTS | exchange
    )


def test_weights_are_traded_on_the_next_day(days):
    source = bars({"A": [10, 20, 20, 20], "B": [10, 10, 10, 40]})
    table = pd.DataFrame({"A": [0.5, np.nan, 1.0], "B": [0.5, np.nan, np.nan]}, index=days[:3])
    result = run(WeightStrategy(signal=table, risk_degree=1.0), source)
    # Amounts come from the previous day's closes: 500 of each at 10. By then A costs 20, so it
    # uses up the cash and nothing is left for B.
    orders = result.orders
    assert orders.loc[days[1], "amount"].to_dict() == {"A": 500, "B": 500}
    assert orders.loc[days[1], "deal_amount"].to_dict() == {"A": 500, "B": 0}
    # No orders on the day without weights, nor on the next: 500 of A are the target already.
    assert orders.index.get_level_values(0).unique().tolist() == [days[1]]
    assert result.report["account"].tolist() == [10_000] * 3


class BestTwo(WeightStrategyBase):
    """Equal weights of the two best, written as Qlib's users do."""

    def __init__(self, *, signal):
        super().__init__(signal=signal, risk_degree=0.9)
        self.calls = []

    def generate_target_weight_position(self, score, current, trade_start_time, trade_end_time):
        self.calls.append((score, current, trade_start_time, trade_end_time))
        best = score.sort_values(ascending=False).index[:2]
        return dict.fromkeys(best, 0.5)


def test_a_strategy_with_qlibs_method_trades_towards_its_weights(days):
    source = bars({"A": [10, 11, 12, 13], "B": [10, 9, 8, 9], "C": [5, 5, 5, 5]})
    scores = score_table({"A": [3, 1, 1], "B": [2, 2, np.nan], "C": [1, 3, 2]}, days)
    strategy = BestTwo(signal=scores)
    result = run(strategy, source)
    table = pd.DataFrame(
        {"A": [0.5, np.nan, 0.5], "B": [0.5, 0.5, np.nan], "C": [np.nan, 0.5, 0.5]}, index=days[:3]
    )
    expected = run(WeightStrategy(signal=table, risk_degree=0.9), source)
    pd.testing.assert_frame_equal(result.report, expected.report)
    pd.testing.assert_frame_equal(result.positions, expected.positions)
    score, current, start, end = strategy.calls[1]
    assert score.to_dict() == {"A": 1, "B": 2, "C": 3}
    assert (start, end) == (days[2], days[2] + pd.Timedelta("23:59:59"))
    position = result.positions_normal[days[1]]
    assert current.get_stock_amount_dict() == position.get_stock_amount_dict()
    assert current.calculate_value() == pytest.approx(position.calculate_value())
    assert list(strategy.calls[2][0].index) == ["A", "C"]  # B has no score
    strategy.generate_target_weight_position = lambda **_: {"D": 1.0}
    with pytest.raises(ConfigError, match="unknown instrument of a target weight 'D'"):
        run(strategy, source)
    with pytest.raises(ConfigError, match="needs a method target_weights"):
        run(WeightStrategyBase(signal=scores), source)


def test_instruments_without_a_weight_are_sold_with_odd_lots(days):
    source = bars({"A": [10] * 5, "B": [10] * 5})
    table = pd.DataFrame({"A": [0.6, 0.0], "B": [0.0, 0.37]}, index=days[:2])
    result = run(WeightStrategy(signal=table, risk_degree=1.0), source, trade_unit=100)
    assert result.orders["deal_amount"].tolist() == [600, 600, 300]
    assert result.orders["direction"].tolist() == ["buy", "sell", "buy"]


def test_series_and_table_of_weights_are_equivalent(days):
    source = bars({"A": [10, 11, 12], "B": [10, 9, 8]})
    table = pd.DataFrame({"A": [0.5, 0.2], "B": [0.5, 0.8]}, index=days[:2])
    long = table.copy()
    long.index.name, long.columns.name = "datetime", "instrument"
    table_result = run(WeightStrategy(signal=table), source)
    series_result = run(WeightStrategy(signal=long.stack()), source)
    assert table_result.report.equals(series_result.report)


def test_long_short_sides_are_equal(days):
    source = bars({"A": [10, 10, 11], "B": [10, 10, 10], "C": [10, 10, 9]})
    scores = score_table({"A": [3, 3], "B": [2, 2], "C": [1, 1]}, days)
    result = run(LongShortStrategy(signal=scores, topk=1, risk_degree=1.0), source)
    amounts = result.positions["amount"]
    assert amounts.loc[days[1]].to_dict() == {"A": 500, "C": -500}
    assert result.report["account"].tolist() == pytest.approx([10_000, 11_000])
    assert result.report["value"].iloc[0] == pytest.approx(0)
    # The first day's weights: each side is half of the account.
    weights = result.positions["weight"]
    assert weights.loc[days[1]].to_dict() == pytest.approx({"A": 0.5, "C": -0.5})


def test_short_position_is_reversed_to_long(days):
    source = bars({"A": [10] * 5, "B": [10] * 5})
    scores = score_table({"A": [1, 0, 0], "B": [0, 1, 1]}, days)
    result = run(LongShortStrategy(signal=scores, topk=1, risk_degree=1.0), source)
    amounts = result.positions["amount"]
    assert amounts.loc[days[1]].to_dict() == {"A": 500, "B": -500}
    assert amounts.loc[days[2]].to_dict() == {"A": -500, "B": 500}
    assert result.report["account"].tolist() == [10_000] * 3


def random_problem(seed=0, count=6, factors=2):
    random = np.random.default_rng(seed)
    exposure = random.standard_normal((count, factors))
    root = random.standard_normal((factors, factors)) * 0.01
    bench = random.random(count) + 0.2
    return {
        "score": random.standard_normal(count),
        "exposure": exposure,
        "factor_cov": root @ root.T + np.eye(factors) * 1e-5,
        "residual_var": random.random(count) * 4e-4 + 1e-4,
        "benchmark": bench / bench.sum(),
    }


def test_optimizer_matches_scipy():
    problem = random_problem()
    optimizer = EnhancedIndexingOptimizer(
        lamb=50.0, delta=None, b_dev=0.1, scale_return=False, epsilon=0.0
    )
    problem["score"] = problem["score"] * 0.01
    weights = optimizer(current=np.zeros(6), **problem)
    bench = problem["benchmark"]

    def loss(weight):
        active = weight - bench
        factor = active @ problem["exposure"]
        risk = factor @ problem["factor_cov"] @ factor + problem["residual_var"] @ active**2
        return -(active @ problem["score"] - 50.0 * risk)

    limits = [(max(0, b - 0.1), min(1, b + 0.1)) for b in bench]
    sum_constraint = {"type": "eq", "fun": lambda w: w.sum() - 1}
    best = minimize(loss, bench, bounds=limits, constraints=sum_constraint, tol=1e-14)
    np.testing.assert_allclose(weights, best.x, atol=2e-4)
    assert loss(weights) <= best.fun + 1e-8


def test_optimizer_respects_its_constraints():
    problem = random_problem(1)
    current = problem["benchmark"].copy()
    hold, sell = np.zeros((2, 6), dtype=bool)
    hold[0], sell[1] = True, True
    optimizer = EnhancedIndexingOptimizer(lamb=0.1, delta=0.5, b_dev=None, f_dev=0.3)
    weights = optimizer(current=current, hold=hold, sell=sell, **problem)
    assert weights.sum() == pytest.approx(1)
    assert weights[0] == pytest.approx(current[0], abs=1e-4)
    assert weights[1] == 0
    assert np.abs(weights - current).sum() <= 0.5 + 1e-4
    assert (np.abs((weights - problem["benchmark"]) @ problem["exposure"]) <= 0.3 + 1e-4).all()


def test_infeasible_turnover_limit_is_dropped_with_a_warning(caplog):
    problem = random_problem(2)
    current = np.eye(6)[0]
    optimizer = EnhancedIndexingOptimizer(delta=0.01, b_dev=0.001)
    with caplog.at_level("WARNING"):
        weights = optimizer(current=current, **problem)
    assert "infeasible" in caplog.text
    np.testing.assert_allclose(weights, problem["benchmark"], atol=2e-3)
    with caplog.at_level("WARNING"):
        unchanged = EnhancedIndexingOptimizer(b_dev=0.001)(
            current=current, sell=np.ones(6, dtype=bool), **problem
        )
    assert "keeping the current weights" in caplog.text
    assert unchanged is current
    with pytest.raises(ConfigError, match="delta=-1"):
        EnhancedIndexingOptimizer(delta=-1)


def test_enhanced_indexing_tilts_the_benchmark_to_the_scores(days, tmp_path):
    names = ["A", "B", "NA", "D", "000005", "F"]
    source = bars({n: [10, 10.1, 10, 10.2] for n in names})
    problem = random_problem(3)
    for day in days[:2]:
        folder = tmp_path / f"{day:%Y%m%d}"
        folder.mkdir()
        pd.DataFrame(problem["exposure"], index=names).to_parquet(folder / "factor_exp.parquet")
        pd.DataFrame(problem["factor_cov"]).to_parquet(folder / "factor_cov.parquet")
        risk = pd.DataFrame({"risk": np.sqrt(problem["residual_var"])}, index=names)
        risk.iloc[:5].to_csv(folder / "specific_risk.csv")
        pd.DataFrame(index=["B"], data={"why": ["war"]}).to_csv(folder / "blacklist.csv")
    bench = pd.DataFrame([problem["benchmark"]] * 4, index=days[:4], columns=names)
    scores = score_table({n: [s, s, s] for n, s in zip(names, problem["score"], strict=True)}, days)
    strategy = EnhancedIndexingStrategy(
        riskmodel_root=tmp_path,
        signal=scores,
        benchmark_weights=bench,
        optimizer_kwargs={"b_dev": 0.15, "delta": None, "lamb": 1e-3},
        risk_degree=0.9,
    )
    result = run(strategy, source)
    weights = result.positions["weight"].loc[days[1]]
    assert "B" not in weights.index
    assert weights.sum() == pytest.approx(0.9, rel=0.02)
    active = weights.reindex(names).fillna(0) / weights.sum() - problem["benchmark"]
    assert (active.drop("B").abs() < 0.16).all()
    assert np.corrcoef(active.drop("B"), np.delete(problem["score"], 1))[0, 1] > 0.3
    assert days[3] not in result.orders.index.get_level_values(0)  # that day has no risk model
    with pytest.raises(DataError, match="no field csi500_weight"):
        run(EnhancedIndexingStrategy(riskmodel_root=tmp_path, signal=scores), source)
    with pytest.raises(DataError, match="is not a folder"):
        run(EnhancedIndexingStrategy(riskmodel_root=tmp_path / "x", signal=scores), source)


def test_factor_covariance_is_ordered_like_the_exposures():
    factors = ["size", "value", "beta"]
    cov = pd.DataFrame(np.arange(9.0).reshape(3, 3), index=factors, columns=factors)
    shuffled = cov.loc[["beta", "size", "value"], ["value", "beta", "size"]]
    pd.testing.assert_frame_equal(_align_factors(shuffled, pd.Index(factors)), cov)
    unnamed = pd.DataFrame(cov.to_numpy())
    assert (_align_factors(unnamed, pd.Index(factors)).to_numpy() == cov.to_numpy()).all()
    with pytest.raises(DataError, match=r"shape \(3, 3\), but factor_exp has 2 factors"):
        _align_factors(cov, pd.Index(factors[:2]))


def test_reused_strategy_reads_the_get_benchmark_weights_each_backtest(days):
    names = list("ABC")
    weights = {n: [1 / 3] * 8 for n in names}
    source = bars({n: [10.0] * 8 for n in names}, index_weight=weights)
    strategy = EnhancedIndexingStrategy(
        riskmodel_root=".", signal=score_table({n: [1.0] * 8 for n in names}, days), market="index"
    )
    for dates in (days[:3], days[3:6]):
        exchange = Exchange(source=source)
        strategy.start(exchange, pd.Index(names), dates, np.ones(3, dtype=bool))
        bench = strategy._get_benchmark_weights(dates[-1], pd.Index(names))
        np.testing.assert_allclose(bench, 1 / 3, rtol=1e-6)


def soft_topk(source, scores, **arguments):
    strategy = SoftTopkStrategy(signal=scores, **{"topk": 2, "risk_degree": 1.0, **arguments})
    return run(strategy, source)


def test_soft_topk_moves_weight_from_the_worst_to_the_best(days):
    source = bars({name: [10.0] * 5 for name in "ABC"})
    scores = score_table({"A": [3, 1, 1, 1], "B": [2, 2, 2, 2], "C": [1, 3, 3, 3]}, days)
    result = soft_topk(source, scores, max_sold_weight=0.2)
    amounts = result.positions["amount"].unstack(fill_value=0)
    assert amounts.loc[days[1]].to_dict() == {"A": 500, "B": 500, "C": 0}
    # A loses a fifth of the account on each day, which fills C up; at last it loses all it has.
    assert amounts.loc[days[2]].to_dict() == pytest.approx({"A": 300, "B": 500, "C": 200})
    assert amounts.loc[days[3]].to_dict() == pytest.approx({"A": 100, "B": 500, "C": 400})
    assert amounts.loc[days[4]].to_dict() == pytest.approx({"A": 0, "B": 500, "C": 500})


def test_soft_topk_fills_the_best_first_or_all_equally(days):
    source = bars({name: [10.0] * 3 for name in "ABCD"})
    scores = score_table({"A": [4, 1], "B": [3, 2], "C": [2, 4], "D": [1, 3]}, days)
    first = soft_topk(source, scores, max_sold_weight=0.3).positions["amount"]
    # A and B lose 0.3 each; C is filled up to a half, D gets the rest.
    assert first.loc[days[2]].to_dict() == pytest.approx({"A": 200, "B": 200, "C": 500, "D": 100})
    average = soft_topk(source, scores, max_sold_weight=0.3, buy_method="average_fill")
    amounts = average.positions["amount"].loc[days[2]]
    assert amounts.to_dict() == pytest.approx({"A": 200, "B": 200, "C": 300, "D": 300})


def test_soft_topk_invests_what_can_be_traded_at_the_prices_of_the_bar(days):
    nan = np.nan
    source = bars({"A": [10, 10, nan, 10], "B": [10, 10, 20, 20], "C": [10, 10, 40, 40]})
    scores = score_table({"A": [3, 1, 1], "B": [2, 2, 2], "C": [1, 3, 3]}, days)
    result = soft_topk(source, scores, risk_degree=0.9)
    amounts = result.positions["amount"]
    assert amounts.loc[days[1]].to_dict() == {"A": 450, "B": 450}
    # A is suspended and counts by its last close: the account is 4500 + 9000 + 1000, of which a
    # tenth stays in cash. B and C share 9000 + 1000 - 1450 in equal parts.
    expected = {"A": 450, "B": 8550 / 2 / 20, "C": 8550 / 2 / 40}
    assert amounts.loc[days[2]].to_dict() == pytest.approx(expected)
    as_qlib = backtest(
        strategy=SoftTopkStrategy(signal=scores, topk=2, risk_degree=0.9),
        account=1e4, source=source, exchange_kwargs=NO_COSTS, as_qlib=True,
    )  # fmt: skip
    assert as_qlib.positions["amount"].loc[days[2]].to_dict() == {"A": 450, "B": 213, "C": 106}


def test_soft_topk_reserves_the_costs(days):
    source = bars({"A": [10.0] * 3, "B": [10.0] * 3})
    scores = score_table({"A": [2, 1], "B": [1, 2]}, days)
    strategy = SoftTopkStrategy(signal=scores, topk=1, risk_degree=1.0)
    costs = {"open_cost": 0.01, "close_cost": 0.02, "min_cost": 0.0, "trade_unit": None}
    result = backtest(strategy=strategy, account=1e4, source=source, exchange_kwargs=costs)
    amounts = result.positions["amount"]
    assert amounts.loc[days[1]].to_dict() == pytest.approx({"A": 1000 / 1.02})
    # The reserve is for one trade of the whole account; here the cash after the sale is less.
    cash = 1e4 - 1e4 / 1.02 * 1.01 + 1e4 / 1.02 * 0.98
    assert amounts.loc[days[2]].to_dict() == pytest.approx({"B": cash / 1.01 / 10})


def test_soft_topk_refuses_wrong_arguments(days):
    with pytest.raises(ConfigError, match="buy_method"):
        SoftTopkStrategy(signal=0, topk=2, buy_method="rank_fill")
    with pytest.raises(ConfigError, match="max_sold_weight=0"):
        SoftTopkStrategy(signal=0, topk=2, max_sold_weight=0)
    with pytest.raises(ConfigError, match="topk=0"):
        SoftTopkStrategy(signal=0, topk=0)
    with pytest.raises(ConfigError, match="topk=5 is more than the 2 instruments"):
        soft_topk(
            bars({"A": [1.0] * 3, "B": [1.0] * 3}), score_table({"A": [1], "B": [2]}, days), topk=5
        )
