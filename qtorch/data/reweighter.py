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
from qtorch.core.trust import trusted_type


@trusted_type
class Reweighter(Configured):
    """Base of what gives each training sample a weight (Qlib's data/dataset/weight.py).

    Subclasses implement `reweight`. `needs` names the groups of columns that they look at:
    ("label",) by default, since a frame of all features is large.
    """

    needs: ClassVar[tuple[str, ...]] = ("label",)

    def bind(self, dataset: Any) -> None:
        """Hook: the dataset whose samples are to be weighted, before `reweight`."""

    @abstractmethod
    def reweight(self, data: pd.DataFrame) -> Any:
        """One weight a sample, >= 0: a Series on the frame's index, an array, or a tensor `[S]`.

        `data` holds the samples, indexed by `(datetime, instrument)`, with columns
        `(group, name)` of the groups in `needs`, processed as for learning. Qlib hands a
        TSDataSampler to time-series reweighters; here it is always the frame of the samples'
        own rows.
        """


def checked_weights(weights: Any, index: pd.MultiIndex) -> Tensor:
    """The weights of a reweighter as float32 `[S]`.

    A Series is aligned by its index. Raises DataError for another length, missing, negative or
    infinite weights, and where all are zero.
    """
    if isinstance(weights, pd.DataFrame) and weights.shape[1] == 1:
        weights = weights.iloc[:, 0]
    if isinstance(weights, pd.Series):
        weights = weights.reindex(index).to_numpy(dtype=np.float32)
    if isinstance(weights, Tensor):
        found = weights.detach().to("cpu", torch.float32)
    else:
        found = torch.as_tensor(np.array(weights, dtype=np.float32))
    if tuple(found.shape) != (len(index),):
        raise DataError(
            f"the reweighter gave weights of shape {tuple(found.shape)} for {len(index)} samples; "
            "expected one a sample."
        )
    bad = int((~found.isfinite() | (found < 0)).sum())
    if bad:
        raise DataError(
            f"the reweighter gave {bad} weights that are missing, negative or infinite; "
            "weights must be finite and >= 0."
        )
    if len(found) and not bool((found > 0).any()):
        raise DataError("the reweighter gave weight 0 to every sample.")
    return found
