"""The scores of a prediction, which are copied from the device once."""

from __future__ import annotations

import pytest
import torch
from toy_training import ToyDataset

from qtorch.data.dataset.batches import BatchLoader
from qtorch.model.loop.scoring import ScoreBuffer


@pytest.mark.parametrize(
    "options",
    [
        {"order": "sequential", "batch_size": 70},
        {"order": "day_sequential", "days_per_batch": 5},
        {"order": "day_sequential", "days_per_batch": 5, "pad_tail": True},
    ],
    ids=["samples", "days", "padded"],
)
def test_scores_come_in_the_order_of_the_samples_without_padding(options) -> None:
    samples = ToyDataset().samples("train")
    buffer = ScoreBuffer(len(samples), torch.device("cpu"))
    num_rows = 0
    for batch in BatchLoader(samples, **options):
        score = (batch.date * 1000 + batch.instrument).double()
        num_rows += score.numel()
        if batch.mask is not None:
            score[~batch.mask] = -1
        buffer.append(score, batch)
    assert (num_rows > len(samples)) == options["order"].startswith("day")
    expected = (samples.date * 1000 + samples.instrument).float()
    assert torch.equal(buffer.fetch(), expected)


def test_a_missing_batch_is_noticed() -> None:
    samples = ToyDataset().samples("train")
    buffer = ScoreBuffer(len(samples), torch.device("cpu"))
    batch = samples.batch(torch.arange(5))
    buffer.append(batch.date, batch)
    with pytest.raises(AssertionError, match="every sample"):
        buffer.fetch()
