"""Merging scores, with figures worked by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from qtorch.core.errors import ConfigError, DataError
from qtorch.study import (
    AverageEnsemble,
    Group,
    RollingEnsemble,
    RollingGroup,
    SingleKeyEnsemble,
)


def frame(start: str, values: list[list[float]], names: str = "AB") -> pd.DataFrame:
    dates = pd.bdate_range(start, periods=len(values))
    index = pd.MultiIndex.from_product([dates, list(names)], names=["datetime", "instrument"])
    return pd.DataFrame({"score": np.ravel(values)}, index=index)


def test_later_windows_win_on_doubled_rows_whatever_their_order():
    early = frame("2020-01-06", [[1, 2], [3, 4], [5, 6]])
    late = frame("2020-01-07", [[30, 40], [50, 60], [70, 80]])
    for given in ({"a": early, "b": late}, {"b": late, "a": early}):
        merged = RollingEnsemble()(given)
        assert merged["score"].tolist() == [1, 2, 30, 40, 50, 60, 70, 80]
        assert merged.index.is_monotonic_increasing
        assert merged.index.is_unique
    assert early["score"].tolist() == [1, 2, 3, 4, 5, 6]


def test_of_windows_that_begin_together_the_last_given_wins():
    one, other = frame("2020-01-06", [[1, 2]]), frame("2020-01-06", [[3, 4]])
    assert RollingEnsemble()({0: one, 1: other})["score"].tolist() == [3, 4]


def test_daily_series_are_stitched_too():
    days = pd.DatetimeIndex(pd.bdate_range("2020-01-06", periods=3), name="datetime")
    ic = RollingEnsemble()({"b": pd.Series([0.3], days[2:]), "a": pd.Series([0.1, 0.2], days[:2])})
    assert ic.tolist() == [0.1, 0.2, 0.3]


def test_the_average_is_of_scores_standardised_by_day():
    # Day 1: (1, 3) and (20, 10) become (-1, 1) / sqrt(2) and (1, -1) / sqrt(2): their mean is 0.
    one = frame("2020-01-06", [[1, 3], [0, 2]])
    other = frame("2020-01-06", [[20, 10], [5, 9]])
    averaged = AverageEnsemble()({"x": {"deep": one}, "y": other})
    half = np.sqrt(0.5)
    assert isinstance(averaged, pd.Series)
    np.testing.assert_allclose(averaged, [0, 0, -half, half], atol=1e-12)


def test_a_score_that_one_model_lacks_is_the_others():
    one = frame("2020-01-06", [[1, 2, 3]], "ABC")
    other = frame("2020-01-06", [[4, 8]], "AB")
    averaged = AverageEnsemble()({"x": one, "y": other})
    np.testing.assert_allclose(averaged, [(-1 - np.sqrt(0.5)) / 2, np.sqrt(0.5) / 2, 1.0])


def test_a_single_key_falls_away_at_every_depth():
    ensemble = SingleKeyEnsemble()
    assert ensemble({"a": {"b": {"c": 5}}}) == 5
    assert ensemble({"a": {"b": 1}, "c": {"d": 2, "e": 3}}) == {"a": 1, "c": {"d": 2, "e": 3}}
    assert ensemble({"a": {"b": 1}}, recursion=False) == {"b": 1}
    assert ensemble({}) == {}
    assert ensemble(7) == 7


@pytest.mark.parametrize("ensemble", [RollingEnsemble(), AverageEnsemble()])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "nothing to merge"),
        ({"a": 5}, "holds a int"),
        ({"a": pd.DataFrame({"x": [1]})}, "none called 'datetime'"),
    ],
)
def test_what_cannot_be_merged_is_named(ensemble, given, said):
    with pytest.raises(DataError, match=said):
        ensemble(given)


# -- groups ----------------------------------------------------------------------------------------


def test_rolling_group_groups_by_all_but_the_window():
    first, second = frame("2020-01-06", [[1, 2]]), frame("2020-01-07", [[3, 4]])
    scores = {("lstm", 5, "w1"): second, ("lstm", 5, "w0"): first, ("gru", 5, "w0"): first}
    assert {k: list(v) for k, v in RollingGroup().group(scores).items()} == {
        ("lstm", 5): ["w1", "w0"],
        ("gru", 5): ["w0"],
    }
    for jobs in (1, 2, -1):
        merged = RollingGroup()(scores, n_jobs=jobs)
        assert merged[("lstm", 5)]["score"].tolist() == [1, 2, 3, 4]
        assert list(merged) == [("lstm", 5), ("gru", 5)]


def test_a_key_that_is_no_tuple():
    with pytest.raises(TypeError, match="rec_key_func that returns a tuple"):
        RollingGroup()({"a": frame("2020-01-06", [[1, 2]])})


def test_a_group_of_ones_own():
    def by_letter(numbers):
        grouped = {}
        for key, value in numbers.items():
            grouped.setdefault(key[0], {})[key] = value
        return grouped

    group = Group(by_letter, lambda part: sum(part.values()))
    assert group({"a1": 1, "a2": 2, "b1": 5}) == {"a": 3, "b": 5}
    with pytest.raises(ConfigError, match="group_func"):
        Group(ens=sum)({})
    with pytest.raises(ConfigError, match="reduce"):
        Group(by_letter)({"a1": 1})
