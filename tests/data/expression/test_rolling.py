"""Every rolling operator against pandas, instrument by instrument, on random dirty bars."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.data.expression import evaluate

SMALLEST = {"Skew": 3, "Kurt": 4}


def regression(values, which):
    """Slope, Rsquare and Resi of one window by numpy, on the rows that hold a value."""
    at = np.flatnonzero(~np.isnan(values))
    if len(at) < 2:
        return np.nan
    x, y = at - at.mean(), values[at] - values[at].mean()
    slope = (x * y).sum() / (x * x).sum()
    if which == "Slope":
        return slope
    if which == "Resi":
        return values[-1] - values[at].mean() - slope * (len(values) - 1 - at.mean())
    if y.std(ddof=1) <= 2e-5:
        return np.nan
    return ((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())) ** 2


def wma(values):
    weights = np.arange(1, len(values) + 1)
    return np.nanmean(values * weights / weights.sum())


def mad(values):
    values = values[~np.isnan(values)]
    return np.abs(values - values.mean()).mean()


PLAIN = {
    **{name: name.lower() for name in ("Mean", "Sum", "Std", "Var", "Max", "Min", "Skew", "Kurt")},
    "Med": "median",
    "Count": "count",
}
APPLIED = {
    "IdxMax": lambda v: v.argmax() + 1,
    "IdxMin": lambda v: v.argmin() + 1,
    "Mad": mad,
    "WMA": wma,
    **{name: (lambda v, n=name: regression(v, n)) for name in ("Slope", "Rsquare", "Resi")},
}


def by_pandas(series, name, window):
    """The operator on one instrument's stored rows."""
    if name == "EMA":
        alpha = {"alpha": window} if window < 1 else {"span": window}
        return series.ewm(**alpha, min_periods=1).mean()
    windows = (
        series.expanding(min_periods=1) if window == 0 else series.rolling(window, min_periods=1)
    )
    if name in PLAIN:
        return getattr(windows, PLAIN[name])()
    if name in APPLIED:
        return windows.apply(APPLIED[name], raw=True)
    if name == "Rank":
        return windows.rank(pct=True)
    if name == "Ref":
        return series.shift(window) if window else pd.Series(series.iloc[0], series.index)
    if name == "Delta":
        return series - by_pandas(series, "Ref", window)
    raise AssertionError(name)


def reference(bars, function):
    """`function(x, y)` on each instrument's stored rows, as `[D, N]`; NaN elsewhere."""
    out = np.full(bars.shape[:2], np.nan)
    for j, (first, last) in enumerate(bars.spans.tolist()):
        rows = slice(first, last + 1)
        x, y = (pd.Series(bars.column(f)[rows, j].double().numpy()) for f in ("x", "y"))
        out[rows, j] = function(x, y)
    return out


def check(bars, expression, function, *, tolerance=1e-6):
    ours = evaluate([expression], bars).values[:, :, 0].double().numpy()
    expected = reference(bars, function)
    np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=tolerance, err_msg=expression)


ROLLING = [*PLAIN, *APPLIED, "Rank", "Ref", "Delta", "EMA"]


@pytest.mark.parametrize("name", ROLLING)
@pytest.mark.parametrize("missing", [0.0, 0.03, 0.4])
def test_rolling_operator(random_bars, name, missing):
    bars = random_bars(ROLLING.index(name), missing=missing)
    # Moments of nearly equal numbers lose digits in either program.
    tolerance = {"Skew": 2e-5, "Kurt": 2e-4, "Std": 2e-6, "Rsquare": 1e-5}.get(name, 3e-6)
    windows = [1, 2, 3, 5, 11, 37, 300] + ([] if name == "EMA" else [0])
    for window in windows:
        if window == 0 or window >= SMALLEST.get(name, 1):
            if name in ("Skew", "Kurt") and window == 0:
                continue  # pandas gives NaN on flat windows only in its rolling form
            check(
                bars,
                f"{name}($x, {window})",
                lambda x, _, w=window: by_pandas(x, name, w),
                tolerance=tolerance,
            )


def test_many_windows_at_once_are_each_window_alone(random_bars):
    """Sharing sums among windows and operators changes nothing but rounding."""
    rng = np.random.default_rng(5)
    bars = random_bars(3)
    names = ["Mean", "Std", "Max", "IdxMin", "Rank", "Slope", "Resi", "Med", "Var"]
    texts = [f"{n}($x, {w})" for n in names for w in rng.integers(1, 90, 4)]
    together = evaluate(list(dict.fromkeys(texts)), bars)
    for text in together.fields:
        alone = evaluate([text], bars)
        torch.testing.assert_close(
            together.column(text), alone.column(text), equal_nan=True, rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("missing", [0.0, 0.03, 0.4])
@pytest.mark.parametrize("share", [0, 0.2, 0.5, 0.83, 1])
def test_quantile(random_bars, share, missing):
    bars = random_bars(11, missing=missing)
    for window in (1, 4, 10, 33, 300, 0):

        def expected(x, _, w=window):
            windows = x.expanding(1) if w == 0 else x.rolling(w, min_periods=1)
            return windows.quantile(share)

        check(bars, f"Quantile($x, {window}, {share})", expected)


def test_long_quantiles(random_bars):
    """Windows past the networks' limit go by sorted insertion."""
    bars = random_bars(2, dates=400, instruments=3)
    for window in (250, 260, 0):

        def expected(x, _, w=window):
            windows = x.expanding(1) if w == 0 else x.rolling(w, min_periods=1)
            return windows.quantile(0.3)

        check(bars, f"Quantile($x, {window}, 0.3)", expected)


@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("window", [2, 3, 8, 40])
def test_corr_and_cov(random_bars, window, missing):
    bars = random_bars(7, missing=missing)

    def corr(x, y):
        found = x.rolling(window, min_periods=1).corr(y)
        for side in (x, y):
            found[side.rolling(window, min_periods=1).std() <= 2e-5] = np.nan
        return found

    check(bars, f"Corr($x, $y, {window})", corr, tolerance=1e-5)
    check(bars, f"Cov($x, $y, {window})", lambda x, y: x.rolling(window, min_periods=1).cov(y))


def test_ema_by_alpha_and_over_long_gaps(random_bars):
    bars = random_bars(4, missing=0.1)
    bars.values[20:60, 0, 0] = float("nan")
    for alpha in (0.03, 0.5, 0.999):
        check(bars, f"EMA($x, {alpha})", lambda x, _, a=alpha: by_pandas(x, "EMA", a))


def test_infinite_values_are_missing(random_bars):
    bars = random_bars(6)
    bars.values[30, :, 0] = float("inf")
    clean = random_bars(6)
    clean.values[30, :, 0] = float("nan")
    for name in ("Mean", "Std", "Max", "IdxMax", "Rank", "Slope", "Med", "EMA"):
        text = f"{name}($x, 5)"
        found, expected = (evaluate([text], b).values for b in (bars, clean))
        torch.testing.assert_close(found, expected, equal_nan=True, msg=text)


def test_float64_results_keep_their_digits(random_bars):
    """The difference of two means is not the difference of two rounded means."""
    bars = random_bars(9, missing=0.0)
    bars.values[:] += 10000
    check(
        bars,
        "Mean($x, 5)-Mean($x, 10)",
        lambda x, _: x.rolling(5, 1).mean() - x.rolling(10, 1).mean(),
        tolerance=1e-9,
    )


def test_extremes_and_ranks_of_negative_and_equal_values():
    from qtorch.data.panel import Panel

    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.integers(-3, 4, (200, 4, 2)).astype(np.float32))
    values[values == 0] = -0.0
    bars = Panel(values, pd.bdate_range("2020-01-01", periods=200), list("abcd"), ["x", "y"])
    for name in ("IdxMax", "IdxMin", "Max", "Min", "Rank"):
        for text, of in ((f"{name}($x, 9)", lambda x: x), (f"{name}(Mean($x, 1), 9)", lambda x: x)):
            check(bars, text, lambda x, _, n=name, f=of: by_pandas(f(x), n, 9))
