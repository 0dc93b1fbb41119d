"""Each rank's share of a batch: every sample belongs to exactly one rank, for any sizes."""

from __future__ import annotations

from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_training import ToyDataset

from qtorch.core.errors import ConfigError
from qtorch.data.dataset.batches import (
    BatchLoader,
    BlockLoader,
    ShardedLoader,
    balance_blocks,
    shard_slice,
)

DATASET = ToyDataset(num_days=12, num_instruments=5)
SAMPLES = DATASET.samples(slice(DATASET.segments["train"][0], DATASET.segments["test"][1]))
WORLDS = st.integers(1, 5)


def _concatenate(parts) -> list:
    return list(chain.from_iterable(parts))


def _rows(batch) -> list[tuple[int, int]]:
    """Return the samples of a batch, without padding and dummy samples."""
    if batch.is_dummy:
        return []
    flat = batch.flatten()
    pairs = zip(flat.date.tolist(), flat.instrument.tolist(), strict=True)
    is_sample = [True] * len(flat.date) if flat.mask is None else flat.mask.tolist()
    return [pair for pair, is_real in zip(pairs, is_sample, strict=True) if is_real]


@given(count=st.integers(0, 50), world_size=WORLDS)
def test_shares_cover_all_samples_in_order_with_equal_sizes(count: int, world_size: int) -> None:
    parts = [list(range(count))[shard_slice(count, rank, world_size)] for rank in range(world_size)]
    assert _concatenate(parts) == list(range(count))
    sizes = [len(p) for p in parts]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=30), world_size=WORLDS)
def test_blocks_cover_all_days_and_are_balanced(counts: list[int], world_size: int) -> None:
    bounds = balance_blocks(torch.tensor(counts), world_size)
    assert bounds[0] == 0
    assert bounds[-1] == len(counts)
    assert bounds == sorted(bounds)
    sizes = [sum(counts[a:b]) for a, b in pairwise(bounds)]
    assert max(sizes) <= sum(counts) / world_size + max(counts)


@settings(max_examples=40, deadline=None)
@given(
    world_size=WORLDS,
    size=st.integers(5, 30),
    days=st.integers(5, 9),
    by_day=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_shares_of_a_batch_are_the_batch_of_one_device(
    world_size: int, size: int, days: int, by_day: bool, epoch: int
) -> None:
    loader_arguments = {
        "batch_size": size,
        "days_per_batch": days,
        "order": "day" if by_day else "random",
        "seed": 3,
    }
    expected_batches = list(BatchLoader(SAMPLES, **loader_arguments).batches(epoch))
    ranks = [
        list(
            ShardedLoader(SAMPLES, rank=r, world_size=world_size, **loader_arguments).batches(epoch)
        )
        for r in range(world_size)
    ]
    assert {len(parts) for parts in ranks} == {len(expected_batches)}
    for step, batch in enumerate(expected_batches):
        parts = [_rows(batches[step]) for batches in ranks]
        assert _concatenate(parts) == _rows(batch)
        units = len({d for d, _ in _rows(batch)}) if by_day else len(_rows(batch))
        assert all(batches[step].global_size == units for batches in ranks)
        if by_day:
            owners = [{d for d, _ in part} for part in parts]
            assert sum(len(o) for o in owners) == units  # each day belongs to one rank
        for batches in ranks:
            if batches[step].is_dummy:
                assert batches[step].y.isnan().all()
                assert batches[step].extra["raw_label"].isnan().all()
                assert batches[step].x.isfinite().all()


@settings(max_examples=40, deadline=None)
@given(
    world_size=WORLDS,
    size=st.integers(1, 60),
    days=st.integers(1, 9),
    by_day=st.booleans(),
    limit=st.none() | st.integers(1, 4),
)
def test_validation_blocks_cover_the_segment_once_by_whole_days(
    world_size: int, size: int, days: int, by_day: bool, limit: int | None
) -> None:
    loader_arguments = {
        "batch_size": size,
        "days_per_batch": days,
        "order": "day_sequential" if by_day else "sequential",
    }
    single = list(BatchLoader(SAMPLES, **loader_arguments).batches(0))[:limit]
    ranks = [
        list(
            BlockLoader(
                SAMPLES, rank=r, world_size=world_size, limit=limit, **loader_arguments
            ).batches(0)
        )
        for r in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    blocks = [_concatenate(_rows(b) for b in batches) for batches in ranks]
    assert _concatenate(blocks) == _concatenate(_rows(b) for b in single)
    owners = [{d for d, _ in block} for block in blocks]
    assert sum(len(o) for o in owners) == len(set().union(*owners))


def test_last_batch_too_small_for_all_ranks_is_trimmed() -> None:
    count = len(SAMPLES)
    size = next(s for s in range(5, count) if count % s == 1)
    loader_arguments = {"world_size": 2, "batch_size": size, "order": "random"}
    assert len(ShardedLoader(SAMPLES, rank=0, **loader_arguments)) == count // size + 1
    assert len(ShardedLoader(SAMPLES, rank=0, trim=True, **loader_arguments)) == count // size


def test_too_few_days_for_the_ranks_raises() -> None:
    with pytest.raises(ConfigError, match=r"Set batch.days_per_batch to 3"):
        ShardedLoader(SAMPLES, rank=0, world_size=3, order="day", days_per_batch=2)
    with pytest.raises(ConfigError, match="too few to evaluate"):
        BlockLoader(SAMPLES, rank=0, world_size=20, order="day_sequential", allow_dummies=False)
