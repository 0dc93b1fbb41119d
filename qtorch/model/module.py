"""The one training loop: network, loss, optimizer, scheduler."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from qtorch.core.errors import ConfigError, unknown_name
from qtorch.data.batches import Batch
from qtorch.metrics.ic import ICMeter
from qtorch.metrics.loss import Loss, mean_of
from qtorch.model.factories import OptimizerFactory, SchedulerPlan
from qtorch.model.step_loader import Steps

TRAIN_LOSS, VALID_LOSS, VALID_IC, VALID_RANK_IC, RATE = (
    "train/loss",
    "valid/loss",
    "valid/ic",
    "valid/rank_ic",
    "lr",
)
# Short names of what an early stop or a scheduler may watch, and whether less is better.
MONITORS = {"loss": VALID_LOSS, "ic": VALID_IC, "rank_ic": VALID_RANK_IC, "train_loss": TRAIN_LOSS}
STATE = "qtorch_module"


def network_input(x: Tensor, inputs: str) -> Tensor:
    """`x [B, T, F]` as a network declares it: "window" as it is, "flat" `[B, F * T]`."""
    return x.transpose(1, 2).flatten(1) if inputs == "flat" else x


def as_columns(score: Tensor) -> Tensor:
    """Scores `[B]` or `[B, Q]` as `[B, Q]`."""
    return score[:, None] if score.dim() == 1 else score


def no_interruption() -> bool:
    """Stands where nobody asks to stop."""
    return False


class ScoreModule(pl.LightningModule):
    """Trains a network to score samples; Lightning runs it, over `Steps` of batches.

    One `training_step` takes all batches of a `Steps`, with an optimizer step each (or one for
    each `accumulate` batches and the epoch's tail), so that Lightning's own cost is paid once;
    the numbers are the same bit for bit, however many there are. Hence optimization is "manual"
    in Lightning's words, and the module does what the trainer's arguments of the same names say:
    `accumulate_grad_batches`, `gradient_clip_val`, `gradient_clip_algorithm`.

    Loss sums and scores stay on the device and are read once an epoch: `train/loss`,
    `valid/loss` (weighted means over samples), `valid/ic`, `valid/rank_ic` (means over days;
    against `batch.extra["raw_label"]` where it is, else `y`; the first label column), `lr`.

    `loss` is a `Loss`, or any callable (score, target) -> mean, which is then weighted by the
    number of samples of a batch and takes neither weights nor masks.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[..., Any],
        optimizer: OptimizerFactory,
        scheduler: SchedulerPlan | None = None,
        *,
        num_days: int = 0,
        accumulate: int = 1,
        clip_value: float | None = None,
        clip_algorithm: str | None = None,
        interrupted: Callable[[], bool] = no_interruption,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = network
        self.inputs: str = getattr(network, "inputs", "window")
        self.loss = loss
        self.optimizer_factory = optimizer
        self.plan = scheduler
        self.accumulate = accumulate
        self.clip_value, self.clip_algorithm = clip_value, clip_algorithm
        self.interrupted = interrupted
        self.meter = ICMeter(num_days)
        self.pending = 0  # batches whose gradients wait for an optimizer step
        self.sums = torch.zeros(2, dtype=torch.float64)  # of the running epoch: loss, weight
        self.valid_sums = torch.zeros(2, dtype=torch.float64)
        self.told: dict[str, float] = {}  # the metrics of the running epoch

    # -- one batch -----------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Tensor:
        """The scores `[B, Q]` of a batch; of a day batch `[G * N, Q]`."""
        return self.scores(batch.flat())

    def scores(self, batch: Batch, state: Mapping[str, Tensor] | None = None) -> Tensor:
        """Scores `[B, Q]`; with `state` (parameters and buffers by name) a pure function of it."""
        x = network_input(batch.x, self.inputs)
        if x.dtype != self.dtype:
            x = x.to(self.dtype)
        if state is None:
            return as_columns(self.network(x))
        return as_columns(functional_call(self.network, dict(state), (x,)))

    def loss_sums(
        self, batch: Batch, state: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(sum of weight x loss, sum of weight, scores [B, Q])` of a batch.

        With `state` a pure function of (parameters and buffers, batch), so that members of one
        architecture can be stacked; without, of the network's own.
        """
        score = self.scores(batch, state)
        if batch.y is None:
            raise ConfigError("these batches have no label to learn from (`y` is None).")
        if isinstance(self.loss, Loss):
            total, share = self.loss.sums(score, batch.y, batch.weight, batch.mask)
            return total, share, score
        if batch.weight is not None or batch.mask is not None:
            raise ConfigError(
                f"the loss {type(self.loss).__name__} takes neither sample weights nor masks; "
                "derive it from qtorch.metrics.loss.Loss."
            )
        if score.shape != batch.y.shape:
            raise ValueError(f"score {list(score.shape)}, but target {list(batch.y.shape)}.")
        share = torch.tensor(float(len(score)), device=score.device)
        return self.loss(score, batch.y) * share, share, score

    # -- training ------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        self.sums = self.sums.to(self.device)

    def on_train_epoch_start(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.pending = 0
        self.told = {}

    def training_step(self, steps: Steps) -> None:
        optimizer = self.optimizers()
        mixed = torch.is_autocast_enabled(self.device.type)
        for batch in steps:
            total, share, _ = self.loss_sums(batch.flat())
            loss = mean_of(total, share)
            if self.accumulate > 1:
                loss = loss / self.accumulate
            if mixed:
                # Lightning keeps the precision's context open around a whole training_step.
                with torch.autocast(self.device.type, enabled=False):
                    self.manual_backward(loss)
            else:
                self.manual_backward(loss)
            self.sums += torch.stack((total.detach(), share))
            self.pending += 1
            if self.pending < self.accumulate and not steps.at_end:
                continue
            optimizer.step()  # type: ignore[union-attr]
            optimizer.zero_grad()  # type: ignore[union-attr]
            self.pending = 0
            self._step_scheduler("step", self.trainer.global_step)
            if self._stops(steps):
                break

    def _stops(self, steps: Steps) -> bool:
        if self.interrupted() and not steps.final:
            return True
        return self.trainer.max_steps != -1 and self.trainer.global_step >= self.trainer.max_steps

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        # Behind the GradScaler's unscaling, whatever the precision.
        if self.clip_value is not None:
            self.clip_gradients(optimizer, self.clip_value, self.clip_algorithm)

    def on_train_epoch_end(self) -> None:
        total, share = self.sums.tolist()
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self._tell({TRAIN_LOSS: total / share if share else math.nan, RATE: float(rate)})
        self._step_scheduler("epoch", self.current_epoch + 1)

    # -- validation ----------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self.valid_sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.meter.reset()

    def validation_step(self, steps: Steps) -> None:
        for each in steps:
            batch = each.flat()
            total, share, score = self.loss_sums(batch)
            self.valid_sums += torch.stack((total, share))
            label = batch.extra.get("raw_label", batch.y)
            assert label is not None
            self.meter.update(score[:, 0], label[:, 0], batch.date, batch.mask)

    def on_validation_epoch_end(self) -> None:
        daily = self.meter.compute()
        read = torch.stack((daily.mean_ic(), daily.mean_rank_ic()))
        total, share, ic, rank_ic = torch.cat((self.valid_sums, read.to(self.device))).tolist()
        self.meter.reset()
        loss = total / share if share else math.nan
        self._tell({VALID_LOSS: loss, VALID_IC: ic, VALID_RANK_IC: rank_ic})

    def _tell(self, values: dict[str, float]) -> None:
        """To the callbacks and the progress bar; the keeper sends them to the run."""
        self.told.update(values)
        self.log_dict(values, logger=False, prog_bar=True, on_step=False, on_epoch=True)

    # -- optimizer and scheduler ---------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = self.optimizer_factory(trained)
        if self.plan is None:
            return optimizer
        return [optimizer], [self.plan.factory(optimizer)]

    def _step_scheduler(self, interval: str, count: int) -> None:
        plan = self.plan
        if plan is None or plan.interval != interval or count % plan.frequency:
            return
        scheduler = self.lr_schedulers()
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()  # type: ignore[union-attr]
            return
        name = MONITORS.get(plan.monitor or "loss", plan.monitor or "loss")
        metrics = self.trainer.callback_metrics
        if name not in metrics:
            raise ConfigError(unknown_name("metric for the scheduler", name, metrics))
        scheduler.step(float(metrics[name]))

    # -- for Lightning -------------------------------------------------------------------------

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        return batch  # the loader gathers on the device

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[STATE] = {"sums": self.sums.cpu(), "told": dict(self.told)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.sums = checkpoint[STATE]["sums"].to(self.device)
        self.told = dict(checkpoint[STATE]["told"])
