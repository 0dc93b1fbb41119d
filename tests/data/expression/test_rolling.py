"""All rolling operators compared with pandas, per instrument, on random bars with missing data."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.data.expression import evaluate
from qtorch.data.panel.panel import Panel

MIN_WINDOWS = {"Skew": 3, "Kurt": 4}


def regression(values, statistic):
    """Compute Slope, Rsquare or Resi of one window with numpy, ignoring missing values."""
    positions = np.flatnonzero(~np.isnan(values))
    if len(positions) < 2:
        return np.nan
    x, y = positions - positions.mean(), values[positions] - values[positions].mean()
    slope = (x * y).sum() / (x * x).sum()
    if statistic == "Slope":
        return slope
    if statistic == "Resi":
        return values[-1] - values[positions].mean() - slope * (len(values) - 1 - positions.mean())
    if y.std(ddof=1) <= 2e-5:
        return np.nan
    return ((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())) ** 2


def wma(values):
    weights = np.arange(1, len(values) + 1)
    return np.nanmean(values * weights / weights.sum())


def mad(values):
    values = values[~np.isnan(values)]
    return np.abs(values - values.mean()).mean()


PANDAS_METHODS = {
    **{name: name.lower() for name in ("Mean", "Sum", "Std", "Var", "Max", "Min", "Skew", "Kurt")},
    "Med": "median",
    "Count": "count",
}
WINDOW_FUNCTIONS = {
    "IdxMax": lambda v: v.argmax() + 1,
    "IdxMin": lambda v: v.argmin() + 1,
    "Mad": mad,
    "WMA": wma,
    **{name: (lambda v, n=name: regression(v, n)) for name in ("Slope", "Rsquare", "Resi")},
}


def pandas_result(series, name, window):
    """Compute an operator with pandas on the rows within the span of one instrument."""
    if name == "EMA":
        alpha = {"alpha": window} if window < 1 else {"span": window}
        return series.ewm(**alpha, min_periods=1).mean()
    windows = (
        series.expanding(min_periods=1) if window == 0 else series.rolling(window, min_periods=1)
    )
    if name in PANDAS_METHODS:
        return getattr(windows, PANDAS_METHODS[name])()
    if name in WINDOW_FUNCTIONS:
        return windows.apply(WINDOW_FUNCTIONS[name], raw=True)
    if name == "Rank":
        return windows.rank(pct=True)
    if name == "Ref":
        return series.shift(window) if window else pd.Series(series.iloc[0], series.index)
    if name == "Delta":
        return series - pandas_result(series, "Ref", window)
    raise AssertionError(name)


def apply_by_instrument(bars, function):
    """Apply `function(x, y)` to the span of each instrument: `[D, N]`, NaN elsewhere."""
    out = np.full(bars.shape[:2], np.nan)
    for j, (first, last) in enumerate(bars.spans.tolist()):
        rows = slice(first, last + 1)
        x, y = (pd.Series(bars.column(f)[rows, j].double().numpy()) for f in ("x", "y"))
        out[rows, j] = function(x, y)
    return out


def assert_equals_pandas(bars, expression, function, *, tolerance=1e-6):
    result = evaluate([expression], bars).values[:, :, 0].double().numpy()
    expected = apply_by_instrument(bars, function)
    np.testing.assert_allclose(result, expected, rtol=2e-6, atol=tolerance, err_msg=expression)


ROLLING = [*PANDAS_METHODS, *WINDOW_FUNCTIONS, "Rank", "Ref", "Delta", "EMA"]


@pytest.mark.parametrize("name", ROLLING)
@pytest.mark.parametrize("missing", [0.0, 0.03, 0.4])
def test_rolling_operator_equals_pandas(random_bars, name, missing):
    bars = random_bars(ROLLING.index(name), missing=missing)
    # Moments of nearly equal numbers lose digits in both implementations.
    tolerance = {"Skew": 2e-5, "Kurt": 2e-4, "Std": 2e-6, "Rsquare": 1e-5}.get(name, 3e-6)
    windows = [1, 2, 3, 5, 11, 37, 300] + ([] if name == "EMA" else [0])
    for window in windows:
        if window == 0 or window >= MIN_WINDOWS.get(name, 1):
            if name in ("Skew", "Kurt") and window == 0:
                continue  # pandas returns NaN for flat windows in rolling(), not in expanding()
            assert_equals_pandas(
                bars,
                f"{name}($x, {window})",
                lambda x, _, w=window: pandas_result(x, name, w),
                tolerance=tolerance,
            )


def test_joint_evaluation_equals_separate_evaluation(random_bars):
    """Sharing sums between windows and operators changes results by rounding only."""
    rng = np.random.default_rng(5)
    bars = random_bars(3)
    names = ["Mean", "Std", "Max", "IdxMin", "Rank", "Slope", "Resi", "Med", "Var"]
    texts = [f"{n}($x, {w})" for n in names for w in rng.integers(1, 90, 4)]
    joint = evaluate(list(dict.fromkeys(texts)), bars)
    for text in joint.fields:
        separate = evaluate([text], bars)
        torch.testing.assert_close(
            joint.column(text), separate.column(text), equal_nan=True, rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("missing", [0.0, 0.03, 0.4])
@pytest.mark.parametrize("share", [0, 0.2, 0.5, 0.83, 1])
def test_quantile_equals_pandas(random_bars, share, missing):
    bars = random_bars(11, missing=missing)
    for window in (1, 4, 10, 33, 300, 0):

        def pandas_quantile(x, _, w=window):
            windows = x.expanding(1) if w == 0 else x.rolling(w, min_periods=1)
            return windows.quantile(share)

        assert_equals_pandas(bars, f"Quantile($x, {window}, {share})", pandas_quantile)


def test_quantiles_of_long_windows_equal_pandas(random_bars):
    """Windows beyond the limit of the sorting networks use sorted insertion."""
    bars = random_bars(2, dates=400, instruments=3)
    for window in (250, 260, 0):

        def pandas_quantile(x, _, w=window):
            windows = x.expanding(1) if w == 0 else x.rolling(w, min_periods=1)
            return windows.quantile(0.3)

        assert_equals_pandas(bars, f"Quantile($x, {window}, 0.3)", pandas_quantile)


@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("window", [2, 3, 8, 40])
def test_corr_and_cov_equal_pandas(random_bars, window, missing):
    bars = random_bars(7, missing=missing)

    def corr(x, y):
        correlation = x.rolling(window, min_periods=1).corr(y)
        for side in (x, y):
            correlation[side.rolling(window, min_periods=1).std() <= 2e-5] = np.nan
        return correlation

    assert_equals_pandas(bars, f"Corr($x, $y, {window})", corr, tolerance=1e-5)
    assert_equals_pandas(
        bars, f"Cov($x, $y, {window})", lambda x, y: x.rolling(window, min_periods=1).cov(y)
    )


def test_ema_with_alpha_and_long_gaps_equals_pandas(random_bars):
    bars = random_bars(4, missing=0.1)
    bars.values[20:60, 0, 0] = float("nan")
    for alpha in (0.03, 0.5, 0.999):
        assert_equals_pandas(
            bars, f"EMA($x, {alpha})", lambda x, _, a=alpha: pandas_result(x, "EMA", a)
        )


def test_infinite_values_are_treated_as_missing(random_bars):
    bars = random_bars(6)
    bars.values[30, :, 0] = float("inf")
    clean = random_bars(6)
    clean.values[30, :, 0] = float("nan")
    for name in ("Mean", "Std", "Max", "IdxMax", "Rank", "Slope", "Med", "EMA"):
        text = f"{name}($x, 5)"
        result, expected = (evaluate([text], b).values for b in (bars, clean))
        torch.testing.assert_close(result, expected, equal_nan=True, msg=text)


def test_intermediate_results_are_float64(random_bars):
    """The difference of two means is computed before rounding to float32."""
    bars = random_bars(9, missing=0.0)
    bars.values[:] += 10000
    assert_equals_pandas(
        bars,
        "Mean($x, 5)-Mean($x, 10)",
        lambda x, _: x.rolling(5, 1).mean() - x.rolling(10, 1).mean(),
        tolerance=1e-9,
    )


def test_extremes_and_ranks_of_negative_and_equal_values():
    from qtorch.data.panel.panel import Panel

    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.integers(-3, 4, (200, 4, 2)).astype(np.float32))
    values[values == 0] = -0.0
    bars = Panel(values, pd.bdate_range("2020-01-01", periods=200), list("abcd"), ["x", "y"])
    for name in ("IdxMax", "IdxMin", "Max", "Min", "Rank"):
        for text, transform in (
            (f"{name}($x, 9)", lambda x: x),
            (f"{name}(Mean($x, 1), 9)", lambda x: x),
        ):
            assert_equals_pandas(
                bars, text, lambda x, _, n=name, f=transform: pandas_result(f(x), n, 9)
            )


# -- windows that move by a few float32 steps ------------------------------------------------------


def narrow_bars(num_rows: int = 400) -> Panel:
    """Prices and volumes of several instruments that hardly move compared to their size."""
    rng = np.random.default_rng(0)
    steps = rng.integers(-1, 2, (num_rows, 6)).cumsum(0)
    close = np.column_stack(
        [
            60000 + 0.01 * steps[:, 0],
            -60000 + 0.01 * steps[:, 1],
            60000 + np.arange(num_rows) / 256,  # a straight line
            100 + 1e-5 * steps[:, 2],
            np.where(rng.random(num_rows) < 0.2, np.nan, 60000 + 0.01 * steps[:, 3]),
            100 * np.exp(0.02 * rng.normal(size=num_rows).cumsum()),  # an ordinary stock
        ]
    ).astype(np.float32)
    close[:50, 1] = np.nan
    volume = (1e9 + 64 * rng.integers(-1, 2, (num_rows, 6)).cumsum(0)).astype(np.float32)
    volume[:, 5] = np.exp(rng.normal(10, 1, num_rows))
    values = torch.from_numpy(np.stack([close, volume], axis=2))
    days = pd.bdate_range("2000-01-03", periods=num_rows)
    return Panel(values, days, [f"I{k}" for k in range(6)], ["x", "y"])


def exact_moments(x, y):
    """Std, Slope, Rsquare, Resi, Cov and Corr of one window in extended precision."""
    place, valid = np.arange(len(x)), ~np.isnan(x)
    if valid.sum() < 2:
        return [np.nan] * 6
    x, y, row = (v[valid].astype(np.longdouble) for v in (x, y, place))
    dx, dy, dr = x - x.mean(), y - y.mean(), row - row.mean()
    slope, dof = (dx * dr).sum() / (dr * dr).sum(), len(x) - 1
    std, std_y = np.sqrt((dx * dx).sum() / dof), np.sqrt((dy * dy).sum() / dof)
    is_flat = std <= 2e-5
    rsquare = np.nan if is_flat else slope * (dx * dr).sum() / (dx * dx).sum()
    residual = dx[-1] - slope * dr[-1] if valid[-1] else np.nan
    covariance = (dx * dy).sum() / dof
    correlation = np.nan if is_flat or std_y <= 2e-5 else covariance / (std * std_y)
    return [std, slope, rsquare, residual, covariance, correlation]


@pytest.mark.parametrize("window", [2, 5, 30, 0])
def test_windows_that_hardly_move_keep_their_digits(window):
    bars = narrow_bars()
    names = ["Std($x, {})", "Slope($x, {})", "Rsquare($x, {})", "Resi($x, {})"]
    names += ["Cov($x, $y, {})", "Corr($x, $y, {})"]
    result = evaluate([n.format(window) for n in names], bars).values.double().numpy()
    assert np.nanmax(result[:, :, 2]) <= 1
    rows = [*range(40), *range(40, 400, 17)]
    for column in range(6):
        x, y = (bars.column(f)[:, column].double().numpy() for f in ("x", "y"))
        for row in rows:
            span = slice(max(0, row - window + 1) if window else 0, row + 1)
            expected = np.array(exact_moments(x[span], y[span]), dtype=np.float64)
            if np.isnan(x[span]).all():
                continue
            scale = np.array([1, 1, 1, 1, 1, 1])
            scale = scale * [expected[0], expected[0], 1, expected[0], expected[4] or 1, 1]
            wrong = np.abs(result[row, column] - expected) > 2e-5 * np.abs(scale) + 1e-9
            assert not wrong.any(), (column, row, result[row, column], expected)


def test_few_flat_windows_stay_zero():
    """A mean of 0.1f is no float64 sum of 0.1f divided by its count: not 1e-17, exactly 0."""
    bars = narrow_bars()
    bars.values[100:107, 5, 0] = 0.1
    bars.values[104, 5, 0] = torch.nan
    result = evaluate(["Std($x, 3)", "Var($x, 7)", "Slope($x, 3)", "Skew($x, 7)"], bars).values
    assert (result[102:107, 5, [0, 2]] == 0).all()
    assert result[106, 5, 1] == 0
    assert result[106, 5, 3].isnan()


def test_many_flat_windows_stay_zero():
    bars = narrow_bars()
    bars.values[:, :3, 0] = 60000.0
    result = evaluate(["Std($x, 20)", "Rsquare($x, 20)", "Corr($x, $y, 20)"], bars).values
    assert (result[1:, :3, 0] == 0).all()
    assert result[:, :3, 1:].isnan().all()
