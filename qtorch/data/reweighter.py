"""Sample weights for training."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qtorch.core.configured import Configured
from qtorch.core.errors import DataError
from qtorch.core.trust import trust_subclasses


@trust_subclasses
class Reweighter(Configured):
    """Base class for weighting training samples (Qlib's data/dataset/weight.py).

    Subclasses implement `reweight`. `needs` names the column groups that they read: ("label",)
    by default, because a frame of all features is large.
    """

    needs: ClassVar[tuple[str, ...]] = ("label",)

    def bind(self, dataset: Any) -> None:
        """Hook that is called with the dataset of the samples before `reweight`."""

    @abstractmethod
    def reweight(self, data: pd.DataFrame) -> Any:
        """Return one weight >= 0 per sample: a Series on the frame's index, an array or a tensor.

        `data` holds the samples, indexed by `(datetime, instrument)`, with columns
        `(group, name)` of the groups in `needs`, processed for learning. Qlib passes a
        TSDataSampler to time-series reweighters; here it is always the frame of the samples'
        own rows.
        """


def validate_weights(weights: Any, index: pd.MultiIndex) -> Tensor:
    """Convert a reweighter's weights to float32 `[S]`.

    A Series is aligned by its index. Raises DataError for a wrong length, for missing, negative or
    infinite weights, and if all weights are zero.
    """
    if isinstance(weights, pd.DataFrame) and weights.shape[1] == 1:
        weights = weights.iloc[:, 0]
    if isinstance(weights, pd.Series):
        weights = weights.reindex(index).to_numpy(dtype=np.float32)
    if isinstance(weights, Tensor):
        values = weights.detach().to("cpu", torch.float32)
    else:
        values = torch.as_tensor(np.array(weights, dtype=np.float32))
    if tuple(values.shape) != (len(index),):
        raise DataError(
            f"the reweighter returned weights of shape {tuple(values.shape)} for {len(index)} "
            "samples; expected one weight per sample."
        )
    num_invalid = int((~values.isfinite() | (values < 0)).sum())
    if num_invalid:
        raise DataError(
            f"the reweighter returned {num_invalid} missing, negative or infinite weights; "
            "weights must be finite and >= 0."
        )
    if len(values) and not bool((values > 0).any()):
        raise DataError("the reweighter returned weight 0 for every sample.")
    return values
