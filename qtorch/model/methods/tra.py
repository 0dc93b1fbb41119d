"""Training step of TRA: optimal transport assigns samples to predictors and trains the router."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtorch.core.errors import ConfigError, DataError
from qtorch.data.dataset.batch import Batch
from qtorch.data.dataset.extras import Gatherable
from qtorch.data.dataset.samples import Samples
from qtorch.metrics.loss import mean_from_sums
from qtorch.model.loop.module import ScoreModule
from qtorch.model.loop.scoring import evaluation_mode
from qtorch.nn.lora import use_effective_weights
from qtorch.nn.temporal.tra import TRA, minmax, sinkhorn

log = logging.getLogger(__name__)

CHUNK_SIZE = 8192  # samples per forward pass without gradients
DECAY_STEPS = 100  # `lamb` is multiplied by `rho` once in so many steps


class TRAModule(ScoreModule):
    """A ScoreModule that adds to the routed predictions' loss `lamb` times a router loss.

    The router loss is the cross-entropy between the router and the optimal transport plan of the
    batch. The plan's cost is each predictor's scaled error, mixed by `alpha` with its mean past
    error (1: no past errors). `lamb` is multiplied by `rho` every 100 steps. In the first
    `pretrain` epochs the plan itself routes the loss, and the router is not trained.

    The errors of the train segment are recomputed at the start of each epoch and updated by each
    batch; they are saved in checkpoints. The errors of the valid segment are computed before each
    validation. A prediction for date t uses the errors of dates up to t minus the label's horizon.

    Differences from Qlib: a prediction never depends on the label of its own date (Qlib's transport
    "oracle" routes the valid and test segments by their labels), nor on what was scored before
    (Qlib's memory belongs to the dataset and is empty for a loaded model). Samples without a label
    are not used in plan, loss or memory. A batch of one sample works, and the last incomplete batch
    is not dropped.
    """

    errors: Tensor

    single_device_reason: ClassVar[str | None] = (
        "its transport plan assigns all samples of a batch to the predictors, and "
        "its memory stores their errors"
    )

    def __init__(
        self,
        *args: Any,
        lamb: float = 1.0,
        rho: float = 1.0,
        alpha: float = 1.0,
        pretrain: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not 0 <= alpha <= 1 or not 0 <= rho <= 1:
            raise ConfigError(f"alpha={alpha} and rho={rho} must be between 0 and 1.")
        if self.day_label is not None:
            raise ConfigError(
                "TRA stores errors with respect to the dataset's labels: remove day_label, and use "
                "a label processor (CSZScoreNorm, CSRankNorm) instead."
            )
        self.lamb, self.rho, self.alpha, self.pretrain = lamb, rho, alpha, pretrain

    @classmethod
    def prepare_prediction(
        cls, network: nn.Module, samples: Samples, load_labeled: Callable[[slice], Samples]
    ) -> Samples:
        """Add an extra "errors" to the samples: the past errors of the network."""
        assert isinstance(network, TRA), "fit has checked the network"
        memory = ErrorMemory(network, samples)
        first, last = samples.calendar[max(memory.start, 0)], samples.calendar[memory.end - 1]
        try:
            past = load_labeled(slice(first, last))
        except DataError as error:
            past = None
            log.warning("TRA predicts without past errors: %s", error)
        if past is not None and past.target is not None:
            past = past.to(samples.device)
            memory.record_errors(network, past, memory.places(past))
        samples.extras = {**samples.extras, "errors": memory}
        return samples

    def bind(self, train: Samples, valid: Samples | None) -> None:
        network = self.require_network(TRA)
        if train.horizon is not None and train.horizon > network.label_horizon:
            raise ConfigError(
                f"label_horizon of TRA is {network.label_horizon}, but the labels look "
                f"{train.horizon} days ahead: errors would be used before they are known."
            )
        self._train, self._valid = train, valid
        self.memory = ErrorMemory(network, train)
        self.register_buffer("errors", self.memory.values)
        if valid is not None:
            self.valid_memory = ErrorMemory(network, valid)
            self._valid_places = [self.valid_memory.places(samples) for samples in (train, valid)]
        self._train_places = self.memory.places(train)

    def on_train_start(self) -> None:
        super().on_train_start()
        self.memory.values = self.errors  # the buffer may have moved to another device

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.memory.record_errors(self.network, self._train, self._train_places)

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        assert self._valid is not None, "validation needs a valid segment"
        # The lookback of the first valid days reaches into the train segment.
        for samples, places in zip((self._train, self._valid), self._valid_places, strict=True):
            self.valid_memory.record_errors(self.network, samples, places)

    def loss_sums(self, batch: Batch, state: Any = None, *, complete: bool = False) -> Any:
        """As in ScoreModule, with the past errors that the valid samples may use."""
        batch = _add_past_errors(batch, self.valid_memory)
        return super().loss_sums(batch, state, complete=complete)

    def training_sums(self, batch: Batch) -> tuple[Tensor, Tensor | int]:
        flat = batch.flatten()
        (x,), keywords = self.forward_adapter.arguments(_add_past_errors(flat, self.memory))
        with self.effective_network(TRA) as network:
            predictions, logits = network.predictions_and_logits(x, **keywords)
        error, has_label = prediction_errors(predictions, flat)
        with torch.no_grad():
            new_errors = cost = minmax(error)
            if self.alpha < 1:
                past_errors = minmax(keywords["errors"].mean(1))
                cost = minmax(self.alpha * new_errors + (1 - self.alpha) * past_errors)
            plan = sinkhorn(cost, has_label)
            self.memory.write(flat.date, flat.instrument, new_errors, has_label)
        if self.current_epoch < self.pretrain:
            weight = has_label if flat.weight is None else has_label * flat.weight
            return ((error * plan).sum(1) * weight).sum(), weight.sum()
        routing = F.gumbel_softmax(logits.float(), hard=True)
        score = network.mix_predictions(predictions, routing)
        score = score.reshape(*batch.date.shape, *score.shape[1:])
        total, total_weight = self.loss_sums_from_scores(score, batch, complete=self.complete)
        cross_entropy = -(plan * logits.float().log_softmax(-1)).sum()
        router_loss = mean_from_sums(cross_entropy, has_label.sum())
        lamb = self.lamb * self.rho ** (self.trainer.global_step // DECAY_STEPS)
        return total + lamb * total_weight * router_loss, total_weight


def _add_past_errors(batch: Batch, memory: ErrorMemory) -> Batch:
    errors = memory.gather(batch.date, batch.instrument)
    return replace(batch, extra={**batch.extra, "errors": errors})


class Places(NamedTuple):
    """Where the errors of samples are stored.

    `days [D]` and `columns [N]` are the row and the column of the samples' dates and instruments,
    `rows` int64 the numbers of the samples whose date the memory covers.
    """

    days: Tensor
    columns: Tensor
    rows: Tensor


class ErrorMemory(Gatherable):
    """The errors of a TRA's predictors on the days that its samples may look up.

    `values [days + 1, N, K]` start `label_horizon + lookback - 1` days before the first sample.
    They are zero where an error is not known; the last row receives writes that are discarded. For
    date t, `gather` returns errors of dates up to t - label_horizon, whose labels are known at t.
    """

    def __init__(self, network: TRA, samples: Samples) -> None:
        self.calendar, self.instruments = samples.calendar, samples.instruments
        self.lookback, self.horizon = network.lookback, network.label_horizon
        history_days = network.label_horizon + network.lookback - 1
        self.start, self.end = int(samples.date[0]) - history_days, int(samples.date[-1]) + 1
        shape = (self.end - self.start + 1, len(samples.instruments), network.num_states)
        self.values = torch.zeros(shape, device=samples.device)

    @property
    def width(self) -> int:
        return self.values.shape[-1]

    def gather(self, date: Tensor, instrument: Tensor) -> Tensor:
        """Return `[..., lookback, K]`, oldest first, for int64 dates and instruments `[...]`."""
        newest = -self.horizon - self.start  # the row of the newest error, less the date
        offsets = torch.arange(newest - self.lookback + 1, newest + 1, device=date.device)
        return self.values[date[..., None] + offsets, instrument[..., None]]

    def to(self, device: torch.device) -> ErrorMemory:
        memory = object.__new__(ErrorMemory)
        memory.__dict__.update(self.__dict__, values=self.values.to(device))
        return memory

    def write(self, date: Tensor, instrument: Tensor, errors: Tensor, has_label: Tensor) -> None:
        """Store `errors [B, K]` of the samples that have a label, `has_label [B]`."""
        is_discarded = ~has_label
        row = (date - self.start).masked_fill(is_discarded, self.end - self.start)
        self.values[row, instrument] = errors.masked_fill(is_discarded[:, None], 0.0)

    def places(self, samples: Samples) -> Places:
        """Return where the errors of samples are stored. Waits for the device.

        The samples may have another calendar and other instruments.
        """
        days = torch.as_tensor(self.calendar.get_indexer(samples.calendar))
        columns = torch.as_tensor(self.instruments.get_indexer(samples.instruments))
        device = self.values.device
        days, columns = days.masked_fill(days < 0, self.end).to(device), columns.to(device)
        date = days[samples.date.to(device)]
        is_covered = (date >= self.start) & (date < self.end)
        rows = torch.nonzero(is_covered)[:, 0].to(samples.index_device)
        return Places(days, columns, rows)

    @torch.no_grad()
    def record_errors(self, network: nn.Module, samples: Samples, places: Places) -> None:
        """Store the errors of a TRA, or of a LoRA of one, on samples.

        `places` is the result of `places(samples)`, which a training computes only once.
        """
        days, columns, rows = places
        device = self.values.device
        with evaluation_mode(network, device), use_effective_weights(network) as tra:
            assert isinstance(tra, TRA), "fit and predict have checked the network"
            for chunk in torch.split(rows, CHUNK_SIZE):
                batch = samples.send_to_device(samples.batch(chunk))
                x = batch.x.to(tra.predictors.weight.dtype)
                errors, has_label = prediction_errors(tra.predictions(tra.model(x)), batch)
                instrument = columns[batch.instrument]
                has_label = has_label & (instrument >= 0)
                self.write(days[batch.date], instrument.clamp(min=0), minmax(errors), has_label)


def prediction_errors(predictions: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return squared errors `[B, K]` and which samples have a label, `[B]`.

    `predictions` is `[B, K, Q]`. The errors are means over the labels that are not NaN.
    """
    target = batch.y
    assert target is not None, "errors need labels"
    has_label = ~target.isnan()  # [B, Q]
    if batch.mask is not None:
        has_label = has_label & batch.mask[:, None]
    error = (predictions.float() - target.nan_to_num()[:, None]).square() * has_label[:, None]
    return error.sum(-1) / has_label.sum(-1).clamp(min=1)[:, None], has_label.any(-1)
