"""The tables behind the notebook graphs, as Qlib's graphs calculate them from the same frames.

Scores and labels are frames by datetime and instrument (in either order of the levels) with the
columns `score` and `label`; reports and positions are those of a backtest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd

from qtorch.backtest.positions import Positions
from qtorch.core.errors import ConfigError, check_name
from qtorch.metrics.risk import drawdown, risk_analysis
from qtorch.metrics.signal import calc_ic

IC_METHODS = ("IC", "Rank IC")
RISK_FIGURES = ("annualized_return", "max_drawdown", "information_ratio", "std")
MIN_DAYS = 3  # of a month, to be drawn
HOLD, BUY, SELL = 0, 1, -1
SIDES = {"buy": BUY, "sell": SELL, "hold": HOLD}


def check_columns(frame: pd.DataFrame, columns: Iterable[str], title: str) -> None:
    """Raise ConfigError if a frame lacks columns."""
    missing = [name for name in columns if name not in frame]
    if missing:
        raise ConfigError(
            f"{title} has no column {', '.join(missing)}; its columns are "
            f"{', '.join(map(str, frame.columns))}."
        )


def pair_table(pred_label: pd.DataFrame) -> pd.DataFrame:
    """Return scores and labels with the levels datetime and instrument."""
    check_columns(pred_label, ("score", "label"), "pred_label")
    if set(pred_label.index.names) != {"datetime", "instrument"}:
        raise ConfigError(
            "pred_label must have the index levels datetime and instrument; it has "
            f"{', '.join(map(str, pred_label.index.names))}."
        )
    frame = pred_label[["score", "label"]]
    return frame if frame.index.names[0] == "datetime" else frame.swaplevel()


# -- scores and labels -----------------------------------------------------------------------------


def group_returns(pred_label: pd.DataFrame, num_groups: int, *, reverse: bool) -> pd.DataFrame:
    """Mean label of each group of equal size by score, by date; `Group1` has the best scores.

    With the columns `long-short` (the first group less the last) and `long-average` (the first
    less all). Days without any label are left out.
    """
    frame = pair_table(pred_label)
    if reverse:
        frame = frame.assign(score=-frame["score"])
    ordered = frame.dropna(subset=["score"]).sort_values("score", ascending=False)
    by_day = ordered.groupby(level="datetime", sort=True)["label"]
    size = by_day.transform("size") // num_groups
    place = by_day.cumcount()
    group = place // size.where(size > 0)
    means = {
        f"Group{k + 1}": ordered["label"][group == k].groupby(level="datetime").mean()
        for k in range(num_groups)
    }
    table = pd.DataFrame(means, index=pd.DatetimeIndex(sorted(by_day.groups), name="datetime"))
    average = frame.groupby(level="datetime")["label"].mean()
    table["long-short"] = table["Group1"] - table[f"Group{num_groups}"]
    table["long-average"] = table["Group1"] - average.reindex(table.index)
    return table.dropna(how="all")


def daily_ics(pred_label: pd.DataFrame, methods: Sequence[str] = IC_METHODS) -> pd.DataFrame:
    """IC and Rank IC by date, in the columns `methods`."""
    for method in methods:
        check_name("method of the IC", method, IC_METHODS)
    frame = pair_table(pred_label)
    ics = dict(zip(IC_METHODS, calc_ic(frame["score"], frame["label"]), strict=True))
    table = pd.DataFrame({method: ics[method] for method in methods})
    return table.rename_axis("datetime")


def monthly_ics(ic: pd.Series) -> pd.DataFrame:
    """Mean IC of each month: years as rows, months as columns, both as text."""
    dates = pd.DatetimeIndex(ic.index)
    means = ic.groupby([dates.strftime("%Y"), dates.strftime("%m")]).mean()
    years = [f"{year:04d}" for year in range(dates.year.min(), dates.year.max() + 1)]
    months = [f"{month:02d}" for month in range(1, 13)]
    return means.unstack().reindex(
        index=pd.Index(years, name="year"), columns=pd.Index(months, name="month")
    )


def normal_quantiles(values: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Quantiles of the normal distribution, and the standardised values, both ascending."""
    sample = np.sort(values.dropna().to_numpy(np.float64))
    count = len(sample)
    normal = NormalDist()
    theory = np.array([normal.inv_cdf(k / (count + 1)) for k in range(1, count + 1)])
    spread = sample.std()  # that of the fitted normal distribution: ddof 0
    return theory, (sample - sample.mean()) / (spread if spread > 0 else 1.0)


def gaussian_density(values: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The kernel density of values at points, with Scott's bandwidth."""
    bandwidth = values.std(ddof=1) * len(values) ** -0.2
    distances = (points[:, None] - values[None, :]) / bandwidth
    density: np.ndarray = np.exp(-0.5 * distances**2).mean(axis=1)
    density /= bandwidth * math.sqrt(2 * math.pi)
    return density


def scores_with_lag(pred_label: pd.DataFrame, lag: int) -> pd.DataFrame:
    """Scores, and in the column `score_last` those of the instrument `lag` rows before."""
    frame = pair_table(pred_label)
    return frame.assign(score_last=frame.groupby(level="instrument")["score"].shift(lag))


def rank_autocorrelation(pred_label: pd.DataFrame, lag: int) -> pd.Series:
    """Correlation of the ranks of the scores with those `lag` rows before, by date.

    As in Qlib both are ranked among the day's own instruments, so that a pair with a missing
    score does not count but its other score has a rank.
    """
    frame = scores_with_lag(pred_label, lag)
    ranks = frame[["score", "score_last"]].groupby(level="datetime").rank(pct=True)
    return calc_ic(ranks["score"], ranks["score_last"])[0].rename("value")


def score_turnover(pred_label: pd.DataFrame, num_groups: int, lag: int) -> pd.DataFrame:
    """Fraction of the best, and of the worst, group by score that was not in it `lag` rows before.

    Columns `Top` and `Bottom`, by date; NaN if a day has fewer instruments than groups, or no
    scores before it.
    """
    frame = scores_with_lag(pred_label, lag)
    by_day = frame.groupby(level="datetime")
    size = by_day["score"].transform("size") // num_groups
    has_scores_before = by_day["score_last"].count() > 0
    columns = {}
    for title, ascending in (("Top", False), ("Bottom", True)):
        is_now, is_before = (
            by_day[name].rank(method="first", ascending=ascending) <= size
            for name in ("score", "score_last")
        )
        num_staying = (is_now & is_before).groupby(level="datetime").sum()
        count = size.groupby(level="datetime").first()
        columns[title] = 1 - num_staying / count.where((count > 0) & has_scores_before)
    return pd.DataFrame(columns)


# -- reports ---------------------------------------------------------------------------------------


def cumulative_report(report: pd.DataFrame) -> pd.DataFrame:
    """Cumulative returns, drawdowns and turnover of a report, by the names of Qlib's graph."""
    check_columns(report, ("return", "cost", "bench", "turnover"), "the report")
    report = report.sort_index()
    gross, cost, bench = report["return"], report["cost"], report["bench"]
    returns = {"wo": gross, "w": gross - cost}
    excess = {name: value - bench for name, value in returns.items()}

    def falls(values: pd.Series) -> pd.Series:
        return drawdown(values, as_qlib=True)

    table = pd.DataFrame(
        {
            "cum_bench": bench.cumsum(),
            "cum_return_wo_cost": returns["wo"].cumsum(),
            "cum_return_w_cost": returns["w"].cumsum(),
            "return_wo_mdd": falls(returns["wo"]),
            "return_w_cost_mdd": falls(returns["w"]),
            "cum_ex_return_wo_cost": excess["wo"].cumsum(),
            "cum_ex_return_w_cost": excess["w"].cumsum(),
            "cum_ex_return_wo_cost_mdd": falls(excess["wo"]),
            "cum_ex_return_w_cost_mdd": falls(excess["w"]),
            "turnover": report["turnover"],
        }
    )
    table.index = pd.Index(pd.DatetimeIndex(report.index).strftime("%Y-%m-%d"))
    return table


def drawdown_span(returns: pd.Series, falls: pd.Series) -> tuple[Any, Any]:
    """Where the largest drawdown begins (the peak before it) and where it is deepest."""
    end = falls.idxmin()
    return returns.loc[:end].idxmax(), end


def monthly_risk(report: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Risk analysis of the excess returns of each month, by figure.

    Months with fewer than three bars are left out; the columns are `excess_return_with_cost_std`
    and so on, the rows months such as "2020-07".
    """
    check_columns(report, ("return", "cost", "bench"), "report_normal_df")
    excess = report["return"] - report["bench"]
    series = {
        "excess_return_with_cost": excess - report["cost"],
        "excess_return_without_cost": excess,
    }
    months = pd.DatetimeIndex(report.index).strftime("%Y-%m")
    rows: dict[str, dict[str, pd.Series]] = {}
    for month in sorted(set(months)):
        is_month = months == month
        if is_month.sum() >= MIN_DAYS:
            rows[month] = {
                name: risk_analysis(values[is_month], freq="day", as_qlib=True)["risk"]
                for name, values in series.items()
            }
    return {
        figure: pd.DataFrame(
            {
                f"{name}_{figure}": {month: row[name][figure] for month, row in rows.items()}
                for name in series
            }
        )
        for figure in RISK_FIGURES
    }


# -- positions -------------------------------------------------------------------------------------


def position_frame(position: Any) -> pd.DataFrame:
    """Return positions as a frame by (datetime, instrument) with `weight`, of the positions' value.

    `position` is such a frame (`BacktestResult.positions`), or Qlib's mapping of dates to positions
    (`positions_normal_1day.pkl`, `BacktestResult.positions_normal`).
    """
    if isinstance(position, Positions):
        position = position.frame
    if isinstance(position, pd.DataFrame):
        check_columns(position, ("amount", "price"), "the positions")
        frame = position[["amount", "price"]].rename_axis(["datetime", "instrument"])
    elif isinstance(position, Mapping):
        days: dict[Any, Any] = {
            date: getattr(day, "position", day) for date, day in position.items()
        }
        rows = {
            (date, name): (holding["amount"], holding["price"])
            for date, day in days.items()
            for name, holding in day.items()
            if isinstance(holding, Mapping)
        }
        index = pd.MultiIndex.from_tuples(list(rows), names=["datetime", "instrument"])
        frame = pd.DataFrame(list(rows.values()), index=index, columns=["amount", "price"])
    else:
        raise ConfigError(
            f"the positions are a {type(position).__name__}; expected the frame of positions of a "
            "backtest, or a mapping of dates to positions."
        )
    value = frame["amount"] * frame["price"]
    total = value.groupby(level="datetime").transform("sum")
    return frame.assign(weight=value / total)


def position_changes(position: Any, dates: Iterable[Any] | None = None) -> pd.DataFrame:
    """Positions with `status`: 1 bought on the date, 0 held before, -1 sold.

    A row of a sold position has the weight of the bar before. `dates` are those of the backtest,
    for bars without a position.
    """
    frame = position_frame(position)
    weight = frame["weight"].unstack("instrument")
    if dates is not None:
        weight = weight.reindex(pd.DatetimeIndex(list(dates)).union(pd.DatetimeIndex(weight.index)))
    is_held = weight.notna()
    was_held = is_held.shift(1, fill_value=False)
    status = pd.DataFrame(np.nan, index=weight.index, columns=weight.columns)
    status = status.mask(is_held & was_held, HOLD).mask(is_held & ~was_held, BUY)
    status = status.mask(~is_held & was_held, SELL)
    weight = weight.where(is_held, weight.shift(1))
    table = pd.DataFrame({"weight": weight.stack(), "status": status.stack()}).dropna()
    return table.rename_axis(["datetime", "instrument"])


def parse_position(position: Mapping[Any, Any] | None = None) -> pd.DataFrame:
    """Return positions as Qlib's table by (instrument, datetime), a sold one for another bar.

    Columns: `amount`, `price` and `count_day` of the positions, `cash` of the account, `weight` of
    the positions' value, and `status`: 1 bought on the date, 0 held before, -1 sold. A sold
    position has the values of the bar before. Corresponds to
    qlib/contrib/report/analysis_position/parse_position.py.
    """
    if not isinstance(position, Mapping):
        raise ConfigError(
            f"the positions are a {type(position).__name__}; expected a mapping of dates to "
            "positions, as positions_normal_1day.pkl."
        )
    days: list[pd.DataFrame] = []
    last = pd.DataFrame()
    for date, day in position.items():
        content = getattr(day, "position", day)
        holdings = {name: h for name, h in content.items() if isinstance(h, Mapping)}
        rows = pd.DataFrame.from_dict(holdings, orient="index")
        if not rows.empty:
            value = rows["amount"] * rows["price"]
            status = np.where(rows.index.isin(last.index), HOLD, BUY)
            rows = rows.assign(weight=value / value.sum(), cash=content["cash"], status=status)
        sales = last.loc[~last.index.isin(rows.index)].assign(status=SELL)
        days += [table.assign(datetime=date) for table in (rows, sales) if len(table)]
        last = rows
    if not days:
        return pd.DataFrame()
    table = pd.concat(days, sort=True).rename_axis("instrument").reset_index()
    return table.set_index(["instrument", "datetime"])


def label_table(label_data: pd.DataFrame) -> pd.Series:
    """Return the labels (the only column of a frame) by (datetime, instrument)."""
    if label_data.shape[1] != 1:
        raise ConfigError(
            f"label_data must have one column, the label; it has {list(label_data.columns)}."
        )
    labels = label_data.iloc[:, 0].rename("label")
    return labels if labels.index.names[0] == "datetime" else labels.swaplevel()


def add_labels(changes: pd.DataFrame, label_data: pd.DataFrame) -> pd.DataFrame:
    """All labels of the dates of the positions, with `weight` and `status` of those that were held.

    Positions without a label are left out, as in Qlib.
    """
    labels = label_table(label_data)
    dates = changes.index.get_level_values(0)
    stamps = labels.index.get_level_values(0)
    labels = labels[(stamps >= dates.min()) & (stamps <= dates.max())]
    table: pd.DataFrame = labels.to_frame().join(changes)
    return table


def between(table: pd.DataFrame, start_date: Any, end_date: Any) -> pd.DataFrame:
    """Rows between two inclusive dates (None: open)."""
    dates = table.index.get_level_values(0)
    is_inside = np.full(len(table), True)
    if start_date is not None:
        is_inside &= np.asarray(dates >= pd.Timestamp(start_date))
    if end_date is not None:
        is_inside &= np.asarray(dates <= pd.Timestamp(end_date))
    inside: pd.DataFrame = table[is_inside]
    return inside


def trade_returns(
    position: Any,
    report: pd.DataFrame,
    label_data: pd.DataFrame,
    start_date: Any = None,
    end_date: Any = None,
) -> pd.DataFrame:
    """What was bought, sold and held on each date earned above the benchmark on the next.

    For each side `SIDE_value` (the sum of weight times excess label), `SIDE_weight`, `SIDE_mean`
    (their quotient) and `cum_SIDE` (its sum since the start); for `buy_minus_sell` the
    differences, and the sum of the weights as `buy_plus_sell_weight`.
    """
    check_columns(report, ("bench",), "report_normal")
    table = between(
        add_labels(position_changes(position, report.index), label_data), start_date, end_date
    )
    bench = report["bench"].shift(-1).rename_axis("datetime").rename("bench")
    table = table.join(bench, on="datetime")
    table["label"] = table["label"] - table["bench"]
    table = table.dropna()
    table["value"] = table["label"] * table["weight"]
    dates = table.index.get_level_values(0).unique().sort_values()
    result = pd.DataFrame(index=dates)
    for side, status in SIDES.items():
        sums = table[table["status"] == status].groupby(level=0)[["value", "weight"]].sum()
        sums = sums.reindex(dates, fill_value=0.0)
        mean = (sums["value"] / sums["weight"].where(sums["weight"] != 0)).fillna(0.0)
        result[f"{side}_value"], result[f"{side}_weight"] = sums["value"], sums["weight"]
        result[f"{side}_mean"] = mean
    result["buy_minus_sell_value"] = result["buy_value"] - result["sell_value"]
    result["buy_minus_sell_mean"] = result["buy_mean"] - result["sell_mean"]
    result["buy_plus_sell_weight"] = result["buy_weight"] + result["sell_weight"]
    for side in (*SIDES, "buy_minus_sell"):
        result[f"cum_{side}"] = result[f"{side}_mean"].cumsum()
    return result


def label_ranks(
    position: Any, label_data: pd.DataFrame, start_date: Any = None, end_date: Any = None
) -> pd.DataFrame:
    """Mean rank of the labels of what was held, bought and sold on each date, in percent.

    1 is near the best label of the day, 100 the worst; 0 if there is none. Columns Hold, Buy, Sell.
    """
    table = add_labels(position_changes(position), label_data)
    by_day = table["label"].groupby(level=0)
    table["rank"] = by_day.rank(ascending=False) / by_day.transform("size") * 100
    table = between(table, start_date, end_date)
    dates = table.index.get_level_values(0).unique().sort_values()
    columns = {}
    for title, status in (("Hold", HOLD), ("Buy", BUY), ("Sell", SELL)):
        ranks = table.loc[table["status"] == status, "rank"].groupby(level=0).mean()
        is_traded = (table["status"] == status).groupby(level=0).any()
        columns[title] = ranks.reindex(dates).where(is_traded, 0.0)
    return pd.DataFrame(columns, index=dates)
