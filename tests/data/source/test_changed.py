"""Tests of sources, views and loaders whose future is changed."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.errors import ConfigError
from qtorch.data import QlibSource, SyntheticSource, TableSource
from qtorch.data.panel.frames import view_from_frame
from qtorch.data.source.base import Source
from qtorch.data.source.changed import GAP_DAYS, METHODS, ChangedSource, FutureChange
from qtorch.data.source.frame import FrameSource

AFTER = pd.Timestamp("2018-03-30")


@pytest.fixture(scope="module")
def source() -> SyntheticSource:
    return SyntheticSource(12, "2018-01-01", "2018-06-29", num_sectors=2)


@pytest.mark.parametrize("method", METHODS)
def test_only_bars_after_the_date_change(source, method):
    bars = source.load()
    changed = ChangedSource(source, FutureChange(AFTER, method)).load()
    is_late = bars.calendar > AFTER
    assert changed.calendar.equals(bars.calendar)
    early = [p.values[~is_late].nan_to_num(-1.0) for p in (bars, changed)]
    assert torch.equal(early[0], early[1])
    late = [p.values[is_late].nan_to_num(-1.0) for p in (bars, changed)]
    share = float((late[0] != late[1]).float().mean())
    assert share > 0.4
    assert torch.equal(bars.mask[~is_late], changed.mask[~is_late])


def test_scaled_bars_stay_consistent_and_have_another_level(source):
    bars = source.load(["low", "high", "close"])
    changed = ChangedSource(source, FutureChange(AFTER, "scale")).load(["low", "high", "close"])
    late = changed.values[changed.calendar > AFTER]
    has_bar = ~late[..., 0].isnan()
    assert bool((late[..., 0][has_bar] <= late[..., 1][has_bar]).all())
    ratio = (late / bars.values[bars.calendar > AFTER])[..., 2][has_bar]
    assert float(ratio.median()) == pytest.approx(3.0, rel=0.1)
    assert float(ratio.log().std()) == pytest.approx(0.4, rel=0.1)


def test_shuffled_bars_are_those_of_other_days(source):
    bars = source.load(["close"])
    changed = ChangedSource(source, FutureChange(AFTER, "shuffle")).load(["close"])
    late = [p.values[p.calendar > AFTER][..., 0].nan_to_num(-1.0) for p in (bars, changed)]
    assert torch.equal(late[0].sort(0).values, late[1].sort(0).values)


def test_parts_of_changed_bars_are_those_of_the_whole(source):
    for method in METHODS:
        changed = ChangedSource(source, FutureChange(AFTER, method, (AFTER,)))
        whole = changed.load(["close", "volume"])
        names = list(whole.instruments[3:7])
        span = {"start_time": "2018-04-09", "end_time": "2018-05-31"}
        part = changed.load(["volume"], instruments=names, **span)
        expected = whole.select(
            fields=["volume"], instruments=names, start="2018-04-09", end="2018-05-31"
        )
        assert torch.equal(part.values.nan_to_num(-1.0), expected.values.nan_to_num(-1.0)), method
        assert torch.equal(part.mask, expected.mask), method


def test_delete_ends_spans_and_memberships(source):
    changed = ChangedSource(source, FutureChange(AFTER, "delete"))
    members, old_members = changed.read_membership("all"), source.read_membership("all")
    ends = {n: spans[-1][1] for n, spans in members.items()}
    leavers = [n for n, end in ends.items() if end == AFTER and old_members[n][-1][1] > AFTER]
    assert 3 <= len(leavers) < len(members)
    bars = changed.load(["close"])
    columns = bars.instruments.get_indexer(pd.Index(leavers))
    assert bool(bars.values[bars.calendar > AFTER][:, columns].isnan().all())
    assert not bool(bars.mask[bars.calendar > AFTER][:, columns].any())
    assert changed.fingerprint() != source.fingerprint()


def test_gaps_are_the_same_in_every_copy(source):
    copies = [
        ChangedSource(source, FutureChange(None, "scale", (AFTER,))).load(["close"]),
        ChangedSource(source, FutureChange(AFTER, "delete", (AFTER,))).load(["close"]),
    ]
    early = copies[0].calendar <= AFTER
    first, second = (p.values[early][..., 0].isnan() for p in copies)
    assert torch.equal(first, second)
    new_gaps = first & ~source.load(["close"]).values[early][..., 0].isnan()
    assert 2 * GAP_DAYS <= int(new_gaps.sum()) <= 4 * GAP_DAYS
    assert not bool(new_gaps[:-GAP_DAYS].any())


@pytest.mark.parametrize("method", METHODS)
def test_views_of_frames_change_after_the_date(method):
    rng = np.random.default_rng(0)
    days = pd.bdate_range("2018-03-01", "2018-05-01", name="datetime")
    index = pd.MultiIndex.from_product([days, list("ABCDEF")], names=["datetime", "instrument"])
    columns = pd.MultiIndex.from_tuples([("feature", "a"), ("label", "y")])
    frame = pd.DataFrame(rng.normal(size=(len(index), 2)), index, columns)
    view = view_from_frame(frame)
    changed = FutureChange(AFTER, method).change_view(view)
    is_late = torch.from_numpy(days > AFTER)
    for group, name in columns:
        old, new = view.group(group).column(name), changed.group(group).column(name)
        assert torch.equal(old[~is_late], new[~is_late])
        same = bool((old[is_late] == new[is_late]).all())
        assert same == (method == "delete")
    assert bool(changed.rows[~is_late].all())
    assert bool(changed.rows[is_late].all()) == (method != "delete")


def overridden_methods() -> set[str]:
    """The methods of Source that a class of this package overrides."""
    classes = {
        c for s in (QlibSource, TableSource, FrameSource, SyntheticSource) for c in s.__mro__
    }
    classes = {c for c in classes if issubclass(c, Source) and c is not Source}
    return {name for c in classes for name in vars(c) if callable(getattr(Source, name, None))}


def test_methods_that_sources_override_are_passed_on():
    names = {n for n in overridden_methods() if not n.startswith("__")}
    assert {"read_bars", "instrument_names"} <= names
    assert names <= set(vars(ChangedSource))


def test_an_unknown_way_is_refused():
    with pytest.raises(ConfigError, match="Did you mean 'shuffle'"):
        FutureChange(AFTER, "shufle")
