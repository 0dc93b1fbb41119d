"""The samples of a segment of any kind of dataset."""

from __future__ import annotations

from typing import Any

from qtorch.data.foreign import as_samples
from qtorch.data.sample_set import Samples as Samples
from qtorch.data.segment_samples import build_samples as build_samples


def get_samples(
    dataset: Any,
    segment: str | slice,
    *,
    data_key: str = "infer",
    purge: bool | None = None,
    **options: Any,
) -> Samples:
    """Return the samples of a dataset's segment, for any kind of dataset.

    A qtorch dataset has a method `samples`; any other object with Qlib's `prepare`, and a plain
    frame, is converted by `qtorch.data.foreign.as_samples`. `purge` None means that samples for
    learning are purged by the label's horizon (if it is known) and those for inference are not.
    """
    samples_method = getattr(dataset, "samples", None)
    if callable(samples_method):
        should_purge = (data_key == "learn") if purge is None else purge
        samples: Samples = samples_method(segment, data_key=data_key, purge=should_purge, **options)
        return samples
    return as_samples(dataset, segment, data_key=data_key, purge=purge, **options)
