from __future__ import annotations

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtorch.core.errors import ConfigError
from qtorch.data.batches import ORDERS, Batch, BatchLoader
from qtorch.data.columns import PanelColumns
from qtorch.data.panel import Panel
from qtorch.data.samples import Samples, build_samples
from qtorch.data.view import View


def made(
    num_dates: int = 9, num_instruments: int = 5, missing: float = 0.3, seed: int = 0
) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    cells = num_dates * num_instruments
    values = torch.arange(float(cells)).view(num_dates, num_instruments, 1).repeat(1, 1, 2)
    panel = Panel(
        values,
        pd.bdate_range("2020-01-01", periods=num_dates),
        [f"I{k:02d}" for k in range(num_instruments)],
        ["NUMBER", "LABEL"],
    )
    rows = torch.rand(num_dates, num_instruments, generator=generator) >= missing
    rows[0, 0] = True
    groups = {"feature": PanelColumns(panel, ["NUMBER"]), "label": PanelColumns(panel, ["LABEL"])}
    return build_samples(View(groups, rows=rows, history=rows))


def numbers(batch: Batch) -> list[int]:
    """The cell that each sample of a batch is; padding left out."""
    flat = batch.flat()
    x = flat.x[:, -1, 0] if flat.mask is None else flat.x[flat.mask][:, -1, 0]
    return [int(v) for v in x]


shapes = {
    "num_dates": st.integers(1, 9),
    "num_instruments": st.integers(1, 6),
    "missing": st.sampled_from([0.0, 0.4, 0.9]),
    "seed": st.integers(0, 99),
    "order": st.sampled_from(ORDERS),
    "batch_size": st.integers(1, 60),
    "days_per_batch": st.integers(1, 5),
    "pad_tail": st.booleans(),
}


@settings(max_examples=60, deadline=None)
@given(**shapes)
def test_an_epoch_is_every_sample_once(
    num_dates, num_instruments, missing, seed, order, batch_size, days_per_batch, pad_tail
):
    samples = made(num_dates, num_instruments, missing, seed)
    loader = BatchLoader(
        samples,
        order=order,
        seed=seed,
        batch_size=batch_size,
        days_per_batch=days_per_batch,
        pad_tail=pad_tail,
    )
    batches = list(loader)
    assert len(batches) == len(loader)
    seen = [number for batch in batches for number in numbers(batch)]
    everything = (samples.date * num_instruments + samples.instrument).tolist()
    assert sorted(seen) == everything
    assert sum(batch.num_samples for batch in batches) == len(samples)
    if order.endswith("sequential"):
        assert seen == everything
    if pad_tail:
        assert len({len(batch.x) for batch in batches}) == 1
    # The same numbers again, from any step of the epoch on, whatever was drawn in between.
    torch.rand(3)
    again = [numbers(batch) for batch in loader.batches(0, len(batches) // 2)]
    assert again == [numbers(batch) for batch in batches[len(batches) // 2 :]]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), days=st.integers(1, 4), missing=st.sampled_from([0.0, 0.5]))
def test_day_batches_hold_exactly_one_days_universe_each(seed, days, missing):
    samples = made(8, 6, missing, seed)
    for batch in BatchLoader(samples, order="day", seed=seed, days_per_batch=days):
        assert batch.mask is not None
        assert batch.y is not None
        for g in range(len(batch.x)):
            there = batch.mask[g]
            date = batch.date[g][there].unique()
            assert len(date) == 1
            universe = samples.instrument[samples.date == date]
            assert batch.instrument[g][there].tolist() == universe.tolist()
            assert batch.y[g][~there].isnan().all()


def test_the_order_depends_on_seed_and_epoch_alone():
    samples = made()

    def order(seed: int, epoch: int) -> list[int]:
        loader = BatchLoader(samples, seed=seed, batch_size=7)
        loader.sampler.set_epoch(epoch)
        return [n for batch in loader for n in numbers(batch)]

    torch.manual_seed(1)
    first = order(3, 5)
    torch.manual_seed(2)
    assert order(3, 5) == first
    assert order(3, 6) != first
    assert order(4, 5) != first
    loader = BatchLoader(samples, seed=3, batch_size=7)
    assert [n for batch in loader.batches(5) for n in numbers(batch)] == first


def test_the_order_is_the_same_on_every_machine():
    # Pinned: a run resumed elsewhere, or by a later version, must go on with the same batches.
    loader = BatchLoader(made(4, 3, 0.0), seed=7)
    assert loader.order_of(2).tolist() == [0, 2, 4, 3, 5, 9, 10, 8, 1, 6, 11, 7]


@pytest.mark.parametrize("order", ["random", "day"])
def test_an_epoch_resumed_in_the_middle_goes_on_with_what_was_to_come(order):
    samples = made()
    loader = BatchLoader(samples, order=order, batch_size=6, seed=1)
    loader.set_epoch(3)
    whole = [numbers(batch) for batch in loader]
    running = iter(loader)
    done = [numbers(next(running)) for _ in range(2)]
    state = loader.state_dict()
    assert state == {"epoch": 3, "step": 2}
    other = BatchLoader(samples, order=order, batch_size=6, seed=1)
    other.load_state_dict(state)
    assert done + [numbers(batch) for batch in other] == whole
    # Once: the epoch after it is whole again.
    other.set_epoch(4)
    assert len(list(other)) == len(whole)
    # A state at an epoch's end is the beginning of the next one.
    assert other.state_dict()["step"] == len(other)
    third = BatchLoader(samples, order=order, batch_size=6, seed=1)
    third.load_state_dict(other.state_dict())
    third.set_epoch(5)
    assert len(list(third)) == len(whole)


def test_the_host_store_gives_the_same_batches_one_ahead():
    samples = made()
    expected = [numbers(b) for b in BatchLoader(samples, batch_size=6)]
    host = samples.to("cpu", store="host")
    sent: list[int] = []
    send = host.sent
    host.sent = lambda batch: sent.append(len(sent)) or send(batch)  # type: ignore[method-assign]
    found = []
    for step, batch in enumerate(BatchLoader(host, batch_size=6)):
        found.append(numbers(batch))
        assert len(sent) == min(step + 2, len(expected))
    assert found == expected


def test_a_batch_moves_as_a_whole():
    batch = next(iter(BatchLoader(made(), batch_size=4, pad_tail=True)))
    moved = batch.to("meta")
    assert moved.x.is_meta
    assert moved.y is not None
    assert moved.y.is_meta
    assert moved.mask is not None
    assert moved.mask.is_meta
    assert moved.num_samples == batch.num_samples
    assert batch.flat() is batch


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "randm"}, "unknown order 'randm'.*'random'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"days_per_batch": -1}, "days_per_batch must be at least 1"),
    ],
)
def test_options_that_cannot_be_meant(options, message):
    with pytest.raises(ConfigError, match=message):
        BatchLoader(made(), **options)
