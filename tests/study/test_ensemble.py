"""Tests of merging and averaging scores, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from qtorch.core.errors import ConfigError, DataError
from qtorch.study import AverageEnsemble, Group, RollingEnsemble, RollingGroup, SingleKeyEnsemble


def frame(start: str, values: list[list[float]], names: str = "AB") -> pd.DataFrame:
    dates = pd.bdate_range(start, periods=len(values))
    index = pd.MultiIndex.from_product([dates, list(names)], names=["datetime", "instrument"])
    return pd.DataFrame({"score": np.ravel(values)}, index=index)


def test_later_window_wins_on_duplicate_rows_in_any_order():
    early = frame("2020-01-06", [[1, 2], [3, 4], [5, 6]])
    late = frame("2020-01-07", [[30, 40], [50, 60], [70, 80]])
    for windows in ({"a": early, "b": late}, {"b": late, "a": early}):
        stitched_scores = RollingEnsemble()(windows)
        assert stitched_scores["score"].tolist() == [1, 2, 30, 40, 50, 60, 70, 80]
        assert stitched_scores.index.is_monotonic_increasing
        assert stitched_scores.index.is_unique
    assert early["score"].tolist() == [1, 2, 3, 4, 5, 6]


def test_last_of_windows_with_same_start_wins():
    first, second = frame("2020-01-06", [[1, 2]]), frame("2020-01-06", [[3, 4]])
    assert RollingEnsemble()({0: first, 1: second})["score"].tolist() == [3, 4]


def test_daily_series_are_stitched():
    days = pd.DatetimeIndex(pd.bdate_range("2020-01-06", periods=3), name="datetime")
    ic = RollingEnsemble()({"b": pd.Series([0.3], days[2:]), "a": pd.Series([0.1, 0.2], days[:2])})
    assert ic.tolist() == [0.1, 0.2, 0.3]


def test_scores_are_standardised_by_day_before_averaging():
    # Day 1: (1, 3) and (20, 10) become (-1, 1) / sqrt(2) and (1, -1) / sqrt(2): their mean is 0.
    first = frame("2020-01-06", [[1, 3], [0, 2]])
    second = frame("2020-01-06", [[20, 10], [5, 9]])
    average = AverageEnsemble()({"x": {"deep": first}, "y": second})
    half = np.sqrt(0.5)
    assert isinstance(average, pd.Series)
    np.testing.assert_allclose(average, [0, 0, -half, half], atol=1e-12)


def test_missing_score_is_averaged_over_other_models():
    first = frame("2020-01-06", [[1, 2, 3]], "ABC")
    second = frame("2020-01-06", [[4, 8]], "AB")
    average = AverageEnsemble()({"x": first, "y": second})
    np.testing.assert_allclose(average, [(-1 - np.sqrt(0.5)) / 2, np.sqrt(0.5) / 2, 1.0])


def test_single_keys_are_unwrapped_at_every_depth():
    ensemble = SingleKeyEnsemble()
    assert ensemble({"a": {"b": {"c": 5}}}) == 5
    assert ensemble({"a": {"b": 1}, "c": {"d": 2, "e": 3}}) == {"a": 1, "c": {"d": 2, "e": 3}}
    assert ensemble({"a": {"b": 1}}, recursion=False) == {"b": 1}
    assert ensemble({}) == {}
    assert ensemble(7) == 7


@pytest.mark.parametrize("ensemble", [RollingEnsemble(), AverageEnsemble()])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "nothing to merge"),
        ({"a": 5}, "is a int"),
        ({"a": pd.DataFrame({"x": [1]})}, "but no level 'datetime'"),
    ],
)
def test_values_without_dates_raise(ensemble, values, message):
    with pytest.raises(DataError, match=message):
        ensemble(values)


# -- groups ----------------------------------------------------------------------------------------


def test_rolling_group_groups_by_all_but_the_last_key_part():
    first, second = frame("2020-01-06", [[1, 2]]), frame("2020-01-07", [[3, 4]])
    scores = {("lstm", 5, "w1"): second, ("lstm", 5, "w0"): first, ("gru", 5, "w0"): first}
    assert {k: list(v) for k, v in RollingGroup().group(scores).items()} == {
        ("lstm", 5): ["w1", "w0"],
        ("gru", 5): ["w0"],
    }
    for jobs in (1, 2, -1):
        groups = RollingGroup()(scores, n_jobs=jobs)
        assert groups[("lstm", 5)]["score"].tolist() == [1, 2, 3, 4]
        assert list(groups) == [("lstm", 5), ("gru", 5)]


def test_rolling_group_requires_tuple_keys():
    with pytest.raises(TypeError, match="rec_key_func that returns a tuple"):
        RollingGroup()({"a": frame("2020-01-06", [[1, 2]])})


def test_custom_group_function():
    def by_letter(numbers):
        groups = {}
        for key, value in numbers.items():
            groups.setdefault(key[0], {})[key] = value
        return groups

    group = Group(by_letter, lambda part: sum(part.values()))
    assert group({"a1": 1, "a2": 2, "b1": 5}) == {"a": 3, "b": 5}
    with pytest.raises(ConfigError, match="group_func"):
        Group(ens=sum)({})
    with pytest.raises(ConfigError, match="reduce"):
        Group(by_letter)({"a1": 1})
