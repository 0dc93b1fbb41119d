from __future__ import annotations

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtorch.core.errors import ConfigError
from qtorch.data.dataset.batch import Batch
from qtorch.data.dataset.batches import ORDERS, BatchLoader, SampleOrder
from qtorch.data.dataset.samples import Samples, SampleTable, build_samples
from qtorch.data.panel.columns import PanelColumns
from qtorch.data.panel.panel import Panel
from qtorch.data.panel.view import View
from qtorch.data.transfer import CopyStream


def make_samples(
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
    """Return the cell number of each sample of a batch, without padding."""
    flat = batch.flatten()
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
def test_an_epoch_yields_every_sample_once(
    num_dates, num_instruments, missing, seed, order, batch_size, days_per_batch, pad_tail
):
    samples = make_samples(num_dates, num_instruments, missing, seed)
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
    cells = [number for batch in batches for number in numbers(batch)]
    all_cells = (samples.date * num_instruments + samples.instrument).tolist()
    assert sorted(cells) == all_cells
    assert sum(batch.num_samples for batch in batches) == len(samples)
    if order.endswith("sequential"):
        assert cells == all_cells
    if pad_tail:
        assert len({len(batch.x) for batch in batches}) == 1
    # The epoch can be repeated from any step, whatever random numbers are drawn in between.
    torch.rand(3)
    second_half = [numbers(batch) for batch in loader.batches(0, len(batches) // 2)]
    assert second_half == [numbers(batch) for batch in batches[len(batches) // 2 :]]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), days=st.integers(1, 4), missing=st.sampled_from([0.0, 0.5]))
def test_day_batches_hold_exactly_one_days_universe_each(seed, days, missing):
    samples = make_samples(8, 6, missing, seed)
    for batch in BatchLoader(samples, order="day", seed=seed, days_per_batch=days):
        assert batch.mask is not None
        assert batch.y is not None
        for g in range(len(batch.x)):
            is_sample = batch.mask[g]
            date = batch.date[g][is_sample].unique()
            assert len(date) == 1
            universe = samples.instrument[samples.date == date]
            assert batch.instrument[g][is_sample].tolist() == universe.tolist()
            assert batch.y[g][~is_sample].isnan().all()


def test_the_order_depends_only_on_seed_and_epoch():
    samples = make_samples()

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
    # Pinned: a run that resumes elsewhere or with a later version must see the same batches.
    loader = BatchLoader(make_samples(4, 3, 0.0), seed=7)
    assert loader.epoch_order(2).tolist() == [0, 2, 4, 3, 5, 9, 10, 8, 1, 6, 11, 7]


@pytest.mark.parametrize("order", ["random", "day"])
def test_a_resumed_epoch_yields_the_remaining_batches(order):
    samples = make_samples()
    loader = BatchLoader(samples, order=order, batch_size=6, seed=1)
    loader.set_epoch(3)
    whole = [numbers(batch) for batch in loader]
    running = iter(loader)
    first_batches = [numbers(next(running)) for _ in range(2)]
    state = loader.state_dict()
    assert state == {"epoch": 3, "step": 2}
    resumed_loader = BatchLoader(samples, order=order, batch_size=6, seed=1)
    resumed_loader.load_state_dict(state)
    assert first_batches + [numbers(batch) for batch in resumed_loader] == whole
    # The state applies once: the next epoch is complete again.
    resumed_loader.set_epoch(4)
    assert len(list(resumed_loader)) == len(whole)
    # A state at the end of an epoch starts the next one.
    assert resumed_loader.state_dict()["step"] == len(resumed_loader)
    next_loader = BatchLoader(samples, order=order, batch_size=6, seed=1)
    next_loader.load_state_dict(resumed_loader.state_dict())
    next_loader.set_epoch(5)
    assert len(list(next_loader)) == len(whole)


def test_the_host_store_prefetches_the_same_batches():
    samples = make_samples()
    expected_cells = [numbers(b) for b in BatchLoader(samples, batch_size=6)]
    host = samples.to("cpu", store="host")
    num_sent_batches: list[int] = []
    send = host.send_to_device
    host.send_to_device = lambda batch: (
        num_sent_batches.append(len(num_sent_batches)) or send(batch)
    )  # type: ignore[method-assign]
    cells = []
    for step, batch in enumerate(BatchLoader(host, batch_size=6)):
        cells.append(numbers(batch))
        assert len(num_sent_batches) == min(step + 2, len(expected_cells))
    assert cells == expected_cells


def test_labels_are_gathered_ahead_for_several_batches(monkeypatch):
    samples = make_samples()
    loader = BatchLoader(samples, batch_size=6, seed=1)
    order = loader.epoch_order(0)
    gathered: list[int] = []
    rows = SampleTable.rows
    monkeypatch.setattr(
        SampleTable, "rows", lambda self, at: gathered.append(len(at)) or rows(self, at)
    )
    monkeypatch.setattr(SampleOrder, "NUM_ROWS_AHEAD", 15)
    batches = loader.batches(0)
    first = [next(batches) for _ in range(3)]
    assert gathered == [15, 15]  # the third batch begins in the first part and ends after it
    assert samples.target is not None
    samples.target = samples.target + 1  # as a training step may do
    places = torch.split(order, 6)
    for number, batch in enumerate([*first, *batches]):
        expected = samples.batch(places[number])
        if number < 3:
            expected.y -= 1
        for tensor, expected_tensor in zip(batch.tensors(), expected.tensors(), strict=True):
            torch.testing.assert_close(tensor, expected_tensor, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["random", "day", "sequential"])
def test_batches_of_host_memory_are_copied_ahead_of_their_use(order):
    """The next batch is under way while one is used, and each is complete when it is used."""
    samples = make_samples()
    expected = list(BatchLoader(samples, order=order, batch_size=6))
    host = samples.to("cuda", store="host")
    gathered: list[int] = []
    gather = host._gather
    host._gather = lambda *args, **options: (
        gathered.append(len(gathered)) or gather(*args, **options)
    )  # type: ignore[method-assign]
    torch.cuda.set_sync_debug_mode("error")
    batches = []
    try:
        for step, batch in enumerate(BatchLoader(host, order=order, batch_size=6)):
            assert len(gathered) == min(step + 2, len(expected))
            assert batch.x.is_cuda
            # Used on the default stream, as by a network.
            batches.append(batch.with_tensors([tensor * 1 for tensor in batch.tensors()]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        for tensor, expected_tensor in zip(batch.tensors(), other.tensors(), strict=True):
            torch.testing.assert_close(
                tensor.cpu(), expected_tensor * 1, rtol=0, atol=0, equal_nan=True
            )
        assert batch.num_samples == other.num_samples


@pytest.mark.gpu
def test_pinned_memory_is_used_again_after_its_copies(monkeypatch):
    """Two sets of it for a whole epoch; a third one rather than a wait for a copy."""
    pinned: list[int] = []
    pin = torch.Tensor.pin_memory
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda self: pinned.append(self.nbytes) or pin(self)
    )
    stream = CopyStream(torch.device("cuda", 0))
    previous = stream.send([torch.zeros(4)])
    results = []
    for number in range(1, 6):
        pending = stream.send([torch.full((4 - number // 3,), float(number))])
        results.append(previous.receive()[0] * 1)
        # A real copy is quick, but not certain to be done.
        if not stream._used_memory[0][0].query():
            torch.cuda.synchronize()
        previous = pending
    assert [result.tolist()[0] for result in results] == [0, 1, 2, 3, 4]
    assert pinned in ([16], [16, 16])
    waiting = [stream.send([torch.full((4,), float(number))]) for number in range(3)]
    assert [pending.receive()[0].tolist()[0] for pending in waiting] == [0, 1, 2]


@pytest.mark.gpu
def test_host_memory_may_be_reused_after_a_copy_has_been_received():
    tensor = torch.arange(5.0)
    pending = CopyStream(torch.device("cuda", 0)).send([tensor])
    tensor.fill_(7)  # the copy is made from pinned memory
    (copy,) = pending.receive()
    assert (copy * 2).tolist() == [0, 2, 4, 6, 8]


def test_all_tensors_of_a_batch_are_moved():
    batch = next(iter(BatchLoader(make_samples(), batch_size=4, pad_tail=True)))
    meta_batch = batch.to("meta")
    assert meta_batch.x.is_meta
    assert meta_batch.y is not None
    assert meta_batch.y.is_meta
    assert meta_batch.mask is not None
    assert meta_batch.mask.is_meta
    assert meta_batch.num_samples == batch.num_samples
    assert batch.flatten() is batch
    doubled = batch.with_tensors([tensor * 2 for tensor in batch.tensors()])
    assert torch.equal(doubled.instrument, batch.instrument * 2)
    assert torch.equal(doubled.x.nan_to_num(), (batch.x * 2).nan_to_num())
    assert doubled.num_samples == batch.num_samples


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "randm"}, "unknown order 'randm'.*'random'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"days_per_batch": -1}, "days_per_batch must be at least 1"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        BatchLoader(make_samples(), **options)
