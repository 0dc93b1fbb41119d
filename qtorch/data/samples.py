"""The samples of a dataset's segment, whatever the dataset is."""

from __future__ import annotations

from typing import Any

from qtorch.data.foreign import as_samples
from qtorch.data.sample_set import Samples as Samples
from qtorch.data.segment_samples import build_samples as build_samples


def samples_of(
    dataset: Any,
    segment: str | slice,
    *,
    data_key: str = "infer",
    purge: bool | None = None,
    **options: Any,
) -> Samples:
    """The samples of a dataset's segment, whatever the dataset is.

    A qtorch dataset answers itself (`dataset.samples`); any other object with Qlib's `prepare`,
    and a plain frame, go through `qtorch.data.foreign.as_samples`. `purge` None means: samples
    for learning are purged by the label's horizon (where it is known), those for inference are
    not.
    """
    own = getattr(dataset, "samples", None)
    if callable(own):
        purged = (data_key == "learn") if purge is None else purge
        found: Samples = own(segment, data_key=data_key, purge=purged, **options)
        return found
    return as_samples(dataset, segment, data_key=data_key, purge=purge, **options)
