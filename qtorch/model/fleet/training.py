"""The training loop of a fleet: rounds in which every member trains and validates one epoch."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from operator import itemgetter
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from qtorch.data.dataset.batch import Batch
from qtorch.metrics.ic import ICMeter
from qtorch.metrics.loss import mean_from_sums
from qtorch.model.fleet.batches import FleetLoader, MemberBatch
from qtorch.model.fleet.calls import call_as_two, call_for_members, call_for_one
from qtorch.model.fleet.losses import MemberLosses, member_sums
from qtorch.model.fleet.member import Member
from qtorch.model.fleet.optimizers import STACKED, STEPS, StackedOptimizer
from qtorch.model.fleet.stack import Layout, MemberStack, copy_state
from qtorch.model.loop.progress import (
    LEARNING_RATE,
    METRICS,
    TRAIN_LOSS,
    VALID_IC,
    VALID_LOSS,
    VALID_RANK_IC,
    mean_losses,
    mean_or_nan,
)
from qtorch.model.loop.scoring import get_readout
from qtorch.nn.stacked import member_dropout, mix_keys
from qtorch.nn.stacked_layers import StackedLayers
from qtorch.process.heartbeat import beat

log = logging.getLogger(__name__)

# Bytes of the layer outputs of the members that a CPU computes at once: what its cache holds. For
# an LSTM it is less, because torch's kernel for one member is faster than the loop over steps for
# several, unless both are tiny. The loop of a GRU for four members of a few hundred samples is
# faster than its kernel for each.
CACHE_BYTES, LSTM_CACHE_BYTES, GRU_CACHE_BYTES = 4 << 20, 128 << 10, 10 << 20
BATCH_TENSORS = ("x", "date", "instrument", "y", "weight", "mask")


class FleetTraining:
    """Train members side by side; each is what its serial training would have been.

    A round is one epoch of every member: all batches in turn, then the validation. After a round,
    members that have ended leave the stack and waiting ones take their places. The host waits for
    the device once a round, to read the losses. The loop is not Lightning's, whose epochs, steps
    and optimizers belong to one training; devices and precision are Lightning Fabric's.

    `count_samples` is called with the number of samples of each step, of all members.
    """

    def __init__(
        self,
        first: Member,
        device: torch.device,
        count_samples: Callable[[int], None] = lambda number: None,
    ) -> None:
        self.members: list[Member] = []
        self.device, self.count_samples = device, count_samples
        options = first.inputs.recipe.trainer
        self.architecture: nn.Module = first.network
        self.layout = Layout.from_network(first.network)
        self.fabric = Fabric(
            accelerator=device.type,
            devices=1 if device.type == "cpu" else [device.index or 0],
            precision=options.arguments.get("precision") or "32-true",
        )
        self.layers: StackedLayers | None = None
        if options.arguments.get("precision") != "bf16-mixed":
            self.layers = StackedLayers.from_network(first.network)
        self.losses = MemberLosses(first.network, device)
        self.readout = get_readout(first.loss)
        self.clip_algorithm = options.clip_algorithm
        optimizer_class = STACKED[type(first.template)]
        self.moments = optimizer_class.moments(sum(self.layout.sizes), first.template)
        self.optimizer: StackedOptimizer = optimizer_class(self.layout, device, first.template)
        self.is_complete = _has_all_labels(first)
        self.width = _widest_layer(first.network, first.train.num_features)
        self.cache_bytes = _cache_bytes(first.network)
        stack = MemberStack.from_networks(self.layout, [first.network], self.moments, device)
        self.stack = stack.select(torch.zeros(0, dtype=torch.int64, device=device))
        self.best = self.stack.clone()
        self.num_rounds = 0

    # -- the members of the stack --------------------------------------------------------------

    def enter(
        self,
        newcomers: Sequence[Member],
        states: Sequence[tuple[MemberStack, MemberStack] | None],
    ) -> None:
        """Take in members: with the state of a checkpoint (`stack` and `best`), or from scratch."""
        if not newcomers:
            return
        for member, state in zip(newcomers, states, strict=True):
            if state is None:
                stack = MemberStack.from_networks(
                    self.layout, [member.network], self.moments, self.device
                )
                state = stack, stack.clone()
            self.stack, self.best = self.stack.join(state[0]), self.best.join(state[1])
            self.members.append(member)
        self._sort()

    def select(self, place: int) -> tuple[MemberStack, MemberStack]:
        """Return copies of the rows of one member, of the weights and of the best weights."""
        row = torch.tensor([place], device=self.device)
        return self.stack.select(row), self.best.select(row)

    def _sort(self) -> None:
        """Put members of the same samples next to each other."""
        places: dict[int, int] = {}
        for member in self.members:
            places.setdefault(id(member.train), len(places))
        order = sorted(range(len(self.members)), key=lambda k: places[id(self.members[k].train)])
        if order != list(range(len(order))):
            self._keep(order)
        self._build_loaders()

    def _keep(self, places: list[int]) -> None:
        """Keep the members at these places of the stack, in this order."""
        rows = torch.tensor(places, dtype=torch.int64, device=self.device)
        self.stack, self.best = self.stack.select(rows), self.best.select(rows)
        self.members = [self.members[k] for k in places]

    def _build_loaders(self) -> None:
        members = self.members
        self.train_loader = FleetLoader(
            [m.loader for m in members], [m.num_batches for m in members]
        )
        valid_loaders = [m.valid_loader for m in members if m.valid_loader is not None]
        self.valid_loader = FleetLoader(
            valid_loaders, [len(each) for each in valid_loaders], is_shared=True
        )
        self.num_days = max((len(each.samples.calendar) for each in valid_loaders), default=0)
        self.columns = self._group_columns(members[0]) if members else []
        self.losses.set_members(members)
        clips = [m.inputs.recipe.trainer.clip_value for m in members]
        self.clip_values = None
        if any(clip is not None for clip in clips):
            limits = [torch.inf if clip is None else clip for clip in clips]
            self.clip_values = torch.tensor(limits, device=self.device)[:, None]
        seeds = [m.inputs.recipe.seed for m in members]
        self.seeds = torch.tensor(seeds, dtype=torch.int64, device=self.device)

    def _group_columns(self, member: Member) -> list[Tensor]:
        """Return the columns of the weights in each parameter group of the optimizer."""
        names = {id(p): name for name, p in member.network.named_parameters()}
        places = self.layout.columns()
        return [
            torch.cat(
                [
                    torch.arange(s.start, s.stop)
                    for s in (places[names[id(p)]] for p in group["params"])
                ]
            )
            for group in member.template.param_groups
        ]

    # -- one round -----------------------------------------------------------------------------

    def run_round(self, is_stop_requested: Callable[[], bool]) -> bool:
        """Train and validate one epoch of every member.

        Returns False if a stop was requested: the members are then in the middle of an epoch.
        """
        begin = time.perf_counter()
        train_sums = self._train_epoch(is_stop_requested)
        if train_sums is None:
            return False
        figures = self._validate()
        losses = mean_losses(train_sums)
        seconds = time.perf_counter() - begin
        improved = []
        for place, member in enumerate(self.members):
            values = {TRAIN_LOSS: losses[place], LEARNING_RATE: member.learning_rate}
            values.update({} if figures is None else figures[place])
            values = {k: values[k] for k in METRICS if k in values}
            member.seconds += seconds
            member.num_samples += len(member.train)
            if member.finish_epoch(values):
                improved.append(place)
        self._keep_best(improved)
        self.num_rounds += 1
        return True

    def try_step(self) -> None:
        """Train on the first batch, to see how much memory it takes."""
        self.architecture.train()
        self.optimizer.read_hyperparameters([m.template for m in self.members], self.columns)
        self._train_step(next(self.train_loader.batches([0] * len(self.members))))

    def _train_epoch(self, is_stop_requested: Callable[[], bool]) -> Tensor | None:
        sums = torch.zeros(2, len(self.members), dtype=torch.float64, device=self.device)
        self.architecture.train()
        has_step_schedules = any(m.needs_step_schedule for m in self.members)
        templates = [m.template for m in self.members]
        self.optimizer.read_hyperparameters(templates, self.columns)
        for batch in self.train_loader.batches([m.epoch for m in self.members]):
            if is_stop_requested():
                return None
            beat("training")
            total, weight = self._train_step(batch)
            step_sums = torch.stack((total, weight)).double()
            if batch.rows is None:
                sums += step_sums
            else:
                sums.index_add_(1, batch.rows, step_sums)
            for place in batch.members:
                self.members[place].count_step()
            if has_step_schedules:
                self.optimizer.read_hyperparameters(templates, self.columns)
            self.count_samples(sum(batch.num_samples))
        return sums

    def _train_step(self, batch: MemberBatch) -> tuple[Tensor, Tensor]:
        """Update the weights of the batch's members; return their loss and weight sums `[K]`."""
        stack = self.stack if batch.rows is None else self.stack.select(batch.rows)
        total, weight, gradients = self._gradients(stack, batch)
        factors, clip = self.optimizer.factors, self.clip_values
        if batch.rows is not None:
            factors = {name: f.index_select(0, batch.rows) for name, f in factors.items()}
            clip = None if clip is None else clip.index_select(0, batch.rows)
        with torch.no_grad():
            if clip is not None:
                gradients = self._clip(gradients, clip)
            self.optimizer.step(stack.weights, gradients, stack.moments, factors)
            if batch.rows is not None:
                self.stack.write(batch.rows, stack)
        return total, weight

    def _gradients(self, stack: MemberStack, step: MemberBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss sums `[K]`, weight sums `[K]` and gradients `[K, P]` of the mean losses."""
        keys = self._dropout_keys(stack, step)
        batch, parts = self._with_day_labels(step), []
        chunks, is_single = self._chunks(len(step.members), batch.x.shape[1:-1])
        for places in chunks:
            weights = stack.weights[places].detach().requires_grad_()
            buffers = {name: tensor[places] for name, tensor in stack.buffers.items()}
            part = batch if len(chunks) == 1 else batch.map_tensors(itemgetter(places))
            total, weight, _ = self._sums(
                weights,
                buffers,
                part,
                step.members[places],
                is_single=is_single,
                dropout_keys=None if keys is None else keys[places],
            )
            loss = mean_from_sums(total, weight)
            (gradients,) = torch.autograd.grad(loss.sum(), weights)
            parts.append((total.detach(), weight, gradients))
        if len(parts) == 1:
            return parts[0]
        totals, all_weights, all_gradients = (torch.cat(each) for each in zip(*parts, strict=True))
        return totals, all_weights, all_gradients

    def _dropout_keys(self, stack: MemberStack, step: MemberBatch) -> Tensor | None:
        """Return the key `[K]` of each member's dropout masks; None if there is no dropout."""
        if self.layers is not None and not self.layers.has_dropout:
            return None
        seeds = self.seeds if step.rows is None else self.seeds.index_select(0, step.rows)
        return mix_keys(seeds, stack.moments[STEPS][:, 0].long())

    def _chunks(self, num_members: int, row_shape: Sequence[int]) -> tuple[list[slice], bool]:
        """Return which members are computed at once: all, or on a CPU what its cache holds.

        The second value says that each is computed by itself. That and the sizes depend on the
        batch alone and not on how many members there are, which must not change a member's numbers.
        `row_shape` is that of one member's `x` without the features.
        """
        if self.device.type != "cpu":
            return [slice(0, num_members)], False
        size = max(1, self.cache_bytes // (4 * math.prod(row_shape) * self.width))
        places = range(0, num_members, size)
        return [slice(k, min(k + size, num_members)) for k in places], size == 1

    def _clip(self, gradients: Tensor, limit: Tensor) -> Tensor:
        """Clip the gradients `[K, P]` of each member by its own norm, or by value."""
        if self.clip_algorithm == "value":
            return torch.minimum(torch.maximum(gradients, -limit), limit)
        norm = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
        factor: Tensor = (limit / (norm + 1e-6)).clamp(max=1.0)
        return gradients * factor

    def _with_day_labels(self, step: MemberBatch) -> Batch:
        """Return the batch with the labels of each member's training days transformed."""
        batch, rules = step.batch, [self.members[k].day_label for k in step.members]
        if all(rule is None for rule in rules) or batch.y is None:
            return batch
        masks = [None] * len(rules) if batch.mask is None else list(batch.mask)
        labels = [
            y if rule is None else rule(y, mask)
            for rule, y, mask in zip(rules, batch.y, masks, strict=True)
        ]
        return replace(batch, y=torch.stack(labels))

    def _sums(
        self,
        weights: Tensor,
        buffers: Mapping[str, Tensor],
        batch: Batch,
        members: Sequence[int],
        *,
        is_shared: bool = False,
        is_single: bool = False,
        dropout_keys: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss sums `[K]`, weight sums `[K]` and scores `[K, ...]` of the members."""
        tensors: dict[str, Any] = {
            n: getattr(batch, n) for n in BATCH_TENSORS if getattr(batch, n) is not None
        }
        is_complete = self.is_complete and self.architecture.training
        modules = self.losses.select_modules(members)
        module = modules[0]

        def scores_of_member(
            state: dict[str, Tensor],
            key: Tensor | None,
            values: dict[str, Any],
            extra: dict[str, Tensor],
        ) -> Tensor:
            with nullcontext() if key is None else member_dropout(key):
                score: Tensor = module.forward_adapter(Batch(**values, extra=extra), state)
                return score

        def sums_of_member(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
            score = scores_of_member(*inputs)
            return (*member_sums(module, score, inputs[2], is_complete=is_complete), score)

        arguments = {**self.layout.unpack(weights), **buffers}, dropout_keys, tensors, batch.extra
        batch_dim = None if is_shared else 0
        dims = (0, None if dropout_keys is None else 0, batch_dim, batch_dim)
        results: tuple[Tensor, Tensor, Tensor]
        with self.fabric.autocast():
            if is_single:
                # Without vmap, layers use kernels that cannot be batched over members.
                results = call_for_one(sums_of_member, arguments, dims)
                return results
            if self.layers is not None:
                scores = self._chain_scores(arguments[0], dropout_keys, batch, is_shared)
            elif len(modules) == 1:
                results = call_for_members(sums_of_member, arguments, dims, weights)
                return results
            else:
                scores = call_for_members(scores_of_member, arguments, dims, weights)
            total, weight = self.losses.sums(
                members, scores, tensors, is_shared=is_shared, is_complete=is_complete
            )
            return total, weight, scores

    def _chain_scores(
        self, state: dict[str, Tensor], keys: Tensor | None, batch: Batch, is_shared: bool
    ) -> Tensor:
        """Return the scores `[K, ...]` of a network that is a chain of layers."""
        assert self.layers is not None
        num_members = len(next(iter(state.values())))
        shape = batch.date.shape if is_shared else batch.date.shape[1:]
        x = batch.x.transpose(-1, -2).flatten(-2)  # [K, ..., F * T], feature by feature
        x = x.expand(num_members, *x.shape) if is_shared else x
        arguments = state, x.flatten(1, -2), keys
        if num_members > 1 or x.device.type != "cpu":
            scores: Tensor = self.layers(*arguments)
        else:
            scores = call_as_two(self.layers, arguments, (0, 0, None if keys is None else 0))
        return scores.unflatten(1, shape)  # type: ignore[no-any-return,no-untyped-call]  # untyped in torch

    # -- validation ----------------------------------------------------------------------------

    @torch.no_grad()
    def _validate(self) -> list[dict[str, float]] | None:
        """Return the metrics of each member's validation; None without valid segments."""
        if not self.valid_loader.loaders:
            return None
        num_members, num_days = len(self.members), self.num_days
        sums = torch.zeros(2, num_members, dtype=torch.float64, device=self.device)
        meter = ICMeter(num_members * num_days)
        self.architecture.eval()
        places = torch.arange(num_members, device=self.device)
        for step in self.valid_loader.batches([0] * num_members):
            beat("validation")
            rows, batch = step.rows, step.batch
            stack = self.stack if rows is None else self.stack.select(rows)
            total, weight, score = self._validation_sums(stack, step)
            step_sums = torch.stack((total, weight)).double()
            members = places if rows is None else rows
            sums.index_add_(1, members, step_sums)
            self._update_meter(meter, score, batch, members, is_shared=step.is_shared)
        daily = meter.compute()
        means = [x.view(num_members, num_days).nanmean(1) for x in (daily.ic, daily.rank_ic)]
        rows_of_figures = torch.cat((sums, torch.stack(means))).t().tolist()
        return [
            {VALID_LOSS: mean_or_nan(total, weight), VALID_IC: ic, VALID_RANK_IC: rank_ic}
            for total, weight, ic, rank_ic in rows_of_figures
        ]

    def _validation_sums(
        self, stack: MemberStack, step: MemberBatch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss sums `[K]`, weight sums `[K]` and scores `[K, ...]` of a validation batch."""
        parts = []
        row_shape = step.batch.x.shape[:-1] if step.is_shared else step.batch.x.shape[1:-1]
        chunks, is_single = self._chunks(len(step.members), row_shape)
        for places in chunks:
            buffers = {name: tensor[places] for name, tensor in stack.buffers.items()}
            batch = step.batch if step.is_shared else step.batch.map_tensors(itemgetter(places))
            total, weight, score = self._sums(
                stack.weights[places],
                buffers,
                batch,
                step.members[places],
                is_shared=step.is_shared,
                is_single=is_single,
            )
            parts.append((total, weight.expand_as(total), score))
        total, weight, score = (torch.cat(each) for each in zip(*parts, strict=True))
        return total, weight, score

    def _update_meter(
        self, meter: ICMeter, score: Tensor, batch: Batch, members: Tensor, *, is_shared: bool
    ) -> None:
        label = batch.extra.get("raw_label", batch.y)
        assert label is not None
        label, date, mask = label[..., 0], batch.date, batch.mask
        if is_shared:
            shape = (len(members), *date.shape)
            label, date = label.expand(shape), date.expand(shape)
            mask = None if mask is None else mask.expand(shape)
        if score.dim() > date.dim():
            score = self.readout(score)
        offset = (members * self.num_days).view(-1, *[1] * (date.dim() - 1))
        meter.update(score, label, date + offset, mask)

    # -- the best weights, and the end of a member ---------------------------------------------

    def _keep_best(self, places: list[int]) -> None:
        if places:
            rows = torch.tensor(places, dtype=torch.int64, device=self.device)
            self.best.write(rows, self.stack.select(rows))

    def remove_finished_members(self) -> list[Member]:
        """Take the members that have ended out of the stack, with their weights in the network."""
        places = [k for k, m in enumerate(self.members) if m.is_finished]
        if not places:
            return []
        finished_members = [self.members[k] for k in places]
        for place, member in zip(places, finished_members, strict=True):
            has_best = member.progress.best_epoch is not None
            stack = self.best if has_best else self.stack
            stack.write_network(place, member.network)
            if has_best:
                moments = {name: m[place] for name, m in stack.moments.items()}
                member.progress.best_weights = copy_state(member.network)
                member.progress.best_optimizer = member.optimizer_state(moments, self.layout)
        self._keep([k for k in range(len(self.members)) if k not in set(places)])
        self._build_loaders()
        return finished_members


def _cache_bytes(network: nn.Module) -> int:
    """Return the bytes of layer outputs that a CPU computes at once."""
    recurrent_layers = [m for m in network.modules() if isinstance(m, nn.RNNBase)]
    if not recurrent_layers:
        return CACHE_BYTES
    has_only_grus = all(isinstance(m, nn.GRU) for m in recurrent_layers)
    return GRU_CACHE_BYTES if has_only_grus else LSTM_CACHE_BYTES


def _widest_layer(network: nn.Module, num_features: int) -> int:
    """Return the largest number of features that a layer has for each row of a batch."""
    widths = [num_features]
    for module in network.modules():
        if isinstance(module, nn.RNNBase):
            widths.append(4 * module.hidden_size)
        widths += [v for v in (getattr(module, "out_features", None),) if isinstance(v, int)]
    return max(widths)


def _span(places: slice) -> Tensor:
    return torch.arange(places.start, places.stop)


def _has_all_labels(member: Member) -> bool:
    target = member.train.target
    return target is not None and not bool(target.isnan().any()) and member.train.weight is None
