from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qtorch.core.errors import ConfigError, DataError
from qtorch.data.panel.frames import view_from_frame
from qtorch.data.processor import CSRankNorm, CSZFillna, CSZScoreNorm
from qtorch.data.processor import cross_section as cs

NAN, INF = float("nan"), float("inf")
CELLS = st.one_of(st.sampled_from([NAN, NAN, 0.0, 1.0, 1.0, -2.0]), st.floats(-100, 100, width=32))
DAYS = arrays(np.float32, (4, 7), elements=CELLS)
MASKS = arrays(np.bool_, (4, 7))


def apply_by_day(values: np.ndarray, rows: np.ndarray, function) -> np.ndarray:
    """Apply a pandas function to the rows of each day; NaN elsewhere."""
    out = np.full(values.shape, np.nan)
    for d in range(len(values)):
        out[d, rows[d]] = function(pd.Series(values[d, rows[d]].astype(np.float64)))
    return out


def assert_close_in_rows(result: torch.Tensor, rows: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(result.numpy()[rows], expected[rows], rtol=2e-5, atol=2e-5)


@settings(max_examples=60, deadline=None)
@given(DAYS, MASKS)
def test_rank_norm_equals_pandas(values: np.ndarray, rows: np.ndarray) -> None:
    expected = apply_by_day(values, rows, lambda x: (x.rank(pct=True) - 0.5) * 3.46)
    assert_close_in_rows(cs.day_rank_norm(torch.tensor(values), torch.tensor(rows)), rows, expected)


@settings(max_examples=60, deadline=None)
@given(DAYS, MASKS)
def test_median_and_mean_fill_equal_pandas(values: np.ndarray, rows: np.ndarray) -> None:
    x, r = torch.tensor(values), torch.tensor(rows)
    medians = [pd.Series(v[m]).median() for v, m in zip(values, rows, strict=True)]
    np.testing.assert_allclose(cs.day_median(x, r)[:, 0].numpy(), medians, rtol=1e-5, atol=1e-5)
    expected = apply_by_day(values, rows, lambda v: v.fillna(v.mean()))
    assert_close_in_rows(cs.day_mean_fill(x, r), rows, expected)


def test_zscore_equals_pandas_with_ddof_1() -> None:
    rng = np.random.default_rng(1)
    values = rng.standard_normal((5, 9)).astype(np.float32)
    values[rng.random(values.shape) < 0.2] = NAN
    rows = rng.random(values.shape) < 0.8
    expected = apply_by_day(values, rows, lambda x: (x - x.mean()) / x.std())
    assert_close_in_rows(cs.day_zscore(torch.tensor(values), torch.tensor(rows)), rows, expected)
    robust = apply_by_day(
        values,
        rows,
        lambda x: ((x - x.median()) / (x - x.median()).abs().median() / 1.4826).clip(-3, 3),
    )
    assert_close_in_rows(
        cs.day_robust_zscore(torch.tensor(values), torch.tensor(rows)), rows, robust
    )


@pytest.mark.parametrize(
    ("day", "expected"),
    [
        ([0.1, 0.1, 0.1], [NAN, NAN, NAN]),  # equal values, not exact in binary
        ([5.0, NAN, NAN], [NAN, NAN, NAN]),  # one value
        ([1.0, INF, 2.0], [NAN, NAN, NAN]),  # an infinite value
        ([NAN, NAN, NAN], [NAN, NAN, NAN]),
        ([1.0, 2.0, 3.0], [-1.0, 0.0, 1.0]),
    ],
)
def test_zscore_of_degenerate_days_is_nan(day: list[float], expected: list[float]) -> None:
    x = torch.tensor([day])
    zscore = cs.day_zscore(x, torch.ones_like(x, dtype=torch.bool))
    np.testing.assert_allclose(zscore[0].numpy(), expected, atol=1e-6)


def test_infinite_values_rank_first_and_last_with_ties() -> None:
    x = torch.tensor([[INF, 3.0, -INF, INF, NAN]])
    rank = cs.day_rank_norm(x, torch.ones_like(x, dtype=torch.bool))[0] / 3.46 + 0.5
    np.testing.assert_allclose(rank.numpy() * 4, [3.5, 2, 1, 3.5, NAN], atol=1e-5)
    rows = torch.tensor([[True, True, True, False, True]])
    rank = cs.day_rank_norm(x, rows)[0] / 3.46 + 0.5
    np.testing.assert_allclose(rank.numpy()[:3] * 3, [3, 2, 1], atol=1e-5)


def test_values_outside_the_rows_do_not_affect_the_statistics() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0, 2.5, 9.0, 2.0, NAN]])
    rows = torch.tensor([[True] * 4 + [False] * 4])
    rank = (cs.day_rank_norm(x, rows)[0] / 3.46 + 0.5) * 4
    np.testing.assert_allclose(rank.numpy(), [1, 2, 3, 4, 2.5, 4.5, 2, NAN], atol=1e-5)
    z = cs.day_zscore(x, rows)[0]
    assert float(z[6]) == pytest.approx(float(z[1]))
    assert float(z[4]) == pytest.approx((2.5 - 2.5) / 1.290994, abs=1e-5)


def test_finite_mean_ignores_infinite_and_missing_values() -> None:
    x = torch.tensor([[1.0, INF, NAN, 3.0], [INF, -INF, NAN, NAN]])
    mean = cs.day_finite_mean(x, torch.ones_like(x, dtype=torch.bool))
    np.testing.assert_allclose(mean.numpy(), [2.0, NAN])


def test_rank_norm_of_a_day_without_rows_is_nan() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    rank = cs.day_rank_norm(x, torch.tensor([[True, True, False], [False, False, False]]))
    assert rank[0].isfinite().all()
    assert rank[1].isnan().all()


def group_by_day(frame: pd.DataFrame) -> pd.core.groupby.DataFrameGroupBy:
    return frame.sort_index().astype(np.float64).groupby("datetime", group_keys=False)


def test_only_the_selected_group_changes(frame, view, watch_view) -> None:
    check = watch_view(view)
    result = CSRankNorm(fields_group="label")(view)
    expected = (group_by_day(frame["label"]).rank(pct=True) - 0.5) * 3.46
    np.testing.assert_allclose(result.frame()["label"], expected, atol=1e-5)
    before, after = view.group("feature"), result.group("feature")
    assert before is after
    check()


def test_several_groups(frame, view) -> None:
    result = CSZScoreNorm(fields_group=["feature", "label"])(view).frame()
    expected = group_by_day(frame).transform(lambda x: (x - x.mean()) / x.std())
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_one_column_of_a_group(frame, view) -> None:
    result = CSZScoreNorm(fields_group=[("feature", "y")])(view).frame()
    expected = group_by_day(frame[[("feature", "y")]]).transform(lambda x: (x - x.mean()) / x.std())
    np.testing.assert_allclose(result[[("feature", "y")]], expected, atol=1e-5)
    pd.testing.assert_frame_equal(result[[("feature", "x")]], view.frame()[[("feature", "x")]])


def test_missing_values_become_the_mean_of_the_day(frame, view) -> None:
    result = CSZFillna(fields_group="feature")(view).frame()["feature"]
    expected = group_by_day(frame["feature"]).transform(lambda x: x.fillna(x.mean()))
    np.testing.assert_allclose(result, expected, atol=1e-6)


def test_an_unknown_method_raises() -> None:
    with pytest.raises(ConfigError, match="unknown method of CSZScoreNorm 'zscores'"):
        CSZScoreNorm(method="zscores")


@pytest.mark.parametrize("processor", [CSRankNorm(), CSZScoreNorm()])
def test_a_single_instrument_raises(frame, processor) -> None:
    single = frame[frame.index.get_level_values("instrument") == "a"]
    with pytest.raises(DataError, match=r"CS.*Norm compares the instruments of a day"):
        processor(view_from_frame(single))
    frame_with_pair = pd.concat(
        [single, frame[frame.index.get_level_values("instrument") == "b"].iloc[:1]]
    )
    processor(view_from_frame(frame_with_pair.sort_index()))
    CSZFillna()(view_from_frame(single))
