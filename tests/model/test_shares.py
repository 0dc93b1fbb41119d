"""Shares of batches: whatever the sizes, every sample is one rank's, once."""

from __future__ import annotations

from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_training import ToyDataset

from qtorch.core.errors import ConfigError
from qtorch.data.batches import BatchLoader
from qtorch.data.shares import BlockLoader, SharedLoader, balanced_blocks, share_of

DATASET = ToyDataset(num_days=12, num_instruments=5)
SAMPLES = DATASET.samples(slice(DATASET.segments["train"][0], DATASET.segments["test"][1]))
WORLDS = st.integers(1, 5)


def _joined(parts) -> list:
    return list(chain.from_iterable(parts))


def _rows(batch) -> list[tuple[int, int]]:
    """The samples of a batch, padding and company aside."""
    if batch.blank:
        return []
    flat = batch.flat()
    pairs = zip(flat.date.tolist(), flat.instrument.tolist(), strict=True)
    there = [True] * len(flat.date) if flat.mask is None else flat.mask.tolist()
    return [pair for pair, real in zip(pairs, there, strict=True) if real]


@given(count=st.integers(0, 50), world=WORLDS)
def test_shares_cover_all_in_order_and_differ_by_one(count: int, world: int) -> None:
    parts = [list(range(count))[share_of(count, rank, world)] for rank in range(world)]
    assert _joined(parts) == list(range(count))
    sizes = [len(p) for p in parts]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=30), world=WORLDS)
def test_blocks_cover_all_days_and_are_balanced(counts: list[int], world: int) -> None:
    bounds = balanced_blocks(torch.tensor(counts), world)
    assert bounds[0] == 0
    assert bounds[-1] == len(counts)
    assert bounds == sorted(bounds)
    sizes = [sum(counts[a:b]) for a, b in pairwise(bounds)]
    assert max(sizes) <= sum(counts) / world + max(counts)


@settings(max_examples=40, deadline=None)
@given(
    world=WORLDS,
    size=st.integers(5, 30),
    days=st.integers(5, 9),
    by_day=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_every_batch_is_the_one_of_a_single_device(
    world: int, size: int, days: int, by_day: bool, epoch: int
) -> None:
    named = {
        "batch_size": size,
        "days_per_batch": days,
        "order": "day" if by_day else "random",
        "seed": 3,
    }
    whole = list(BatchLoader(SAMPLES, **named).batches(epoch))
    ranks = [
        list(SharedLoader(SAMPLES, rank=r, world=world, **named).batches(epoch))
        for r in range(world)
    ]
    assert {len(parts) for parts in ranks} == {len(whole)}
    for step, batch in enumerate(whole):
        parts = [_rows(batches[step]) for batches in ranks]
        assert _joined(parts) == _rows(batch)
        units = len({d for d, _ in _rows(batch)}) if by_day else len(_rows(batch))
        assert all(batches[step].num_whole == units for batches in ranks)
        if by_day:
            owners = [{d for d, _ in part} for part in parts]
            assert sum(len(o) for o in owners) == units  # a day is one rank's
        for batches in ranks:
            if batches[step].blank:
                assert batches[step].y.isnan().all()
                assert batches[step].extra["raw_label"].isnan().all()
                assert batches[step].x.isfinite().all()


@settings(max_examples=40, deadline=None)
@given(
    world=WORLDS,
    size=st.integers(1, 60),
    days=st.integers(1, 9),
    by_day=st.booleans(),
    limit=st.none() | st.integers(1, 4),
)
def test_judged_blocks_cover_the_segment_once_by_whole_days(
    world: int, size: int, days: int, by_day: bool, limit: int | None
) -> None:
    named = {
        "batch_size": size,
        "days_per_batch": days,
        "order": "day_sequential" if by_day else "sequential",
    }
    single = list(BatchLoader(SAMPLES, **named).batches(0))[:limit]
    ranks = [
        list(BlockLoader(SAMPLES, rank=r, world=world, limit=limit, **named).batches(0))
        for r in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    blocks = [_joined(_rows(b) for b in batches) for batches in ranks]
    assert _joined(blocks) == _joined(_rows(b) for b in single)
    owners = [{d for d, _ in block} for block in blocks]
    assert sum(len(o) for o in owners) == len(set().union(*owners))


def test_a_tail_too_small_for_all_is_left_out_where_modules_know_no_company() -> None:
    count = len(SAMPLES)
    size = next(s for s in range(5, count) if count % s == 1)
    named = {"world": 2, "batch_size": size, "order": "random"}
    assert len(SharedLoader(SAMPLES, rank=0, **named)) == count // size + 1
    assert len(SharedLoader(SAMPLES, rank=0, trim=True, **named)) == count // size


def test_too_few_days_for_the_ranks_name_what_to_set() -> None:
    with pytest.raises(ConfigError, match=r"set batch.days_per_batch to 3"):
        SharedLoader(SAMPLES, rank=0, world=3, order="day", days_per_batch=2)
    with pytest.raises(ConfigError, match="too few to be judged"):
        BlockLoader(SAMPLES, rank=0, world=20, order="day_sequential", blanks=False)
