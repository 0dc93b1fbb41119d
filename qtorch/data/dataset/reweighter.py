"""Sample weights for training."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qtorch.core.configured import Configured
from qtorch.core.errors import ConfigError, DataError
from qtorch.core.trust import trust_subclasses
from qtorch.data.expression import expression_fields
from qtorch.data.handler.handler import DataHandler
from qtorch.data.source.base import Source
from qtorch.data.source.frame import build_source, default_source


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


def check_reweighter(reweighter: Any) -> None:
    """Raise ConfigError for what is neither None nor has Qlib's method `reweight(data)`."""
    if reweighter is not None and not callable(getattr(reweighter, "reweight", None)):
        raise ConfigError(
            f"{type(reweighter).__name__} is not a reweighter: it has no reweight(data) method. "
            "Pass other arguments of fit by their names, such as evals_result=..."
        )


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


class TimeDecay(Reweighter):
    """Weight the newest day 1, and halve the weight with every `half_life` trading days of age.

    Ages count the days of the samples themselves, also if a day has several bars; no weight falls
    below `floor`.
    """

    def __init__(self, half_life: float = 250.0, floor: float = 0.0) -> None:
        if not half_life > 0 or not 0 <= floor <= 1:
            raise ConfigError(
                f"half_life must be positive and floor between 0 and 1, got {half_life} and "
                f"{floor}."
            )
        self.half_life, self.floor = half_life, floor

    def reweight(self, data: pd.DataFrame) -> pd.Series:
        dates = pd.DatetimeIndex(data.index.get_level_values("datetime"))
        place = dates.normalize().factorize(sort=True)[0]
        weight = 0.5 ** ((place.max() - place) / self.half_life)
        return pd.Series(np.maximum(weight, self.floor), index=data.index)


class ExpressionWeight(Reweighter):
    """Weight by (value / its median on the day) ** `power` for an expression over bars.

    Weights are limited to the range 1 / `limit` .. `limit`. A sample without a value gets the
    weight of the median, 1. The expression is evaluated on the sample's own bar without
    look-ahead; windows count bars of the dataset's frequency. `source` is the source of the bars,
    by default the dataset's own.
    """

    def __init__(
        self, expression: str, power: float = 1.0, limit: float = 10.0, source: Any = None
    ) -> None:
        if not limit >= 1:
            raise ConfigError(f"limit must be at least 1, got {limit}.")
        expression_fields([expression])  # raise early for a faulty expression
        self.expression, self.power, self.limit, self.source = expression, power, limit, source
        self._source: Source | None = None if source is None else build_source(source)
        self._freq: str | None = None

    def bind(self, dataset: Any) -> None:
        """Use the dataset's frequency, and its source of bars if none was passed."""
        handler = getattr(dataset, "handler", None)
        if not isinstance(handler, DataHandler):
            return
        if self.source is None:
            self._source = handler.bars_source()
        self._freq = handler.frequency()

    def reweight(self, data: pd.DataFrame) -> pd.Series:
        source = self._source or default_source()
        dates = data.index.get_level_values("datetime")
        names = data.index.get_level_values("instrument").unique().tolist()
        frame = source.features(names, [self.expression], dates.min(), dates.max(), self._freq)
        value = frame.iloc[:, 0].swaplevel().reindex(data.index)
        if value.isna().all():
            raise DataError(f"{self.expression} has no value for any of {len(value)} samples.")
        if (value < 0).any():
            raise DataError(f"{self.expression} is negative for {int((value < 0).sum())} samples.")
        ratio = value / value.groupby(level="datetime").transform("median")
        weight = ratio.where(ratio > 0) ** self.power
        return weight.fillna(1.0).clip(1 / self.limit, self.limit)


class VolatilityWeight(ExpressionWeight):
    """Weight by the standard deviation of the returns of the last `window` bars.

    With the default `power` of -1, calm instruments weigh more.
    """

    def __init__(
        self, window: int = 20, power: float = -1.0, limit: float = 10.0, source: Any = None
    ) -> None:
        self.window = window
        super().__init__(f"Std($close / Ref($close, 1) - 1, {window})", power, limit, source)


class LiquidityWeight(ExpressionWeight):
    """Weight by the mean traded amount of the last `window` bars, by default by its square root."""

    def __init__(
        self, window: int = 20, power: float = 0.5, limit: float = 10.0, source: Any = None
    ) -> None:
        self.window = window
        super().__init__(f"Mean($close * $volume, {window})", power, limit, source)
