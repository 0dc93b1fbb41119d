"""The fleet: jobs whose fits are done together where they have one architecture."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch

from qtorch.core.errors import ConfigError
from qtorch.core.identity import digest
from qtorch.core.runtime import reuse_freed_memory
from qtorch.data.dataset.samples import Samples
from qtorch.model.devices.numerics import describe_numerics, numerical_settings
from qtorch.model.fit import checkpoint_folder, hold_folder
from qtorch.model.fleet.checkpoint import has_member_checkpoint, load_member, save_member
from qtorch.model.fleet.current import current_fleet, use_fleet
from qtorch.model.fleet.display import FleetDisplay
from qtorch.model.fleet.jobs import Job
from qtorch.model.fleet.member import Member, find_refusal
from qtorch.model.fleet.training import FleetTraining
from qtorch.model.loop.checkpoint import LAST, preserve_generators
from qtorch.model.loop.curves import NamedCurves, name_curves
from qtorch.model.loop.interruption import Interruption, TrainingInterrupted
from qtorch.model.loop.training import quiet_lightning
from qtorch.model.recipe import FitInputs, FitResult, Recipe
from qtorch.tracking.recorder import TrainingRecorder

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_CPU_MEMBERS = 64
MEMORY_SHARE = 0.8  # of a GPU's free memory, for the members of a fleet


def fit_as_member(
    inputs: FitInputs, recorder: TrainingRecorder | None, resume: str | Path | None
) -> FitResult | None:
    """Fit as a member of the current fleet; None if the caller has to fit by itself.

    Outside of a fleet, a training that was stopped as a member continues in a fleet of its own.
    """
    if resume != "auto":
        return None
    fleet = current_fleet()
    if fleet is not None:
        return fleet.fit(inputs, recorder)
    if recorder is None or not has_member_checkpoint(recorder.checkpoint_dir()):
        return None
    fleet = Fleet(max_members=1)
    (job,) = fleet.run([partial(fleet.fit, inputs, recorder)])
    if job.error is not None:
        raise job.error
    return job.result


class Fleet:
    """Runs jobs, each of which fits a model; fits of one architecture are trained at once.

    A job is any function that calls `LightningModel.fit`: a whole task with its run and records,
    too. It runs in a thread, one job at a time, until its fit; the fleet then trains the members
    that have gathered, and each job goes on when its member ends. A free place is taken by the next
    job. A fit that cannot be a member (the log says why) is done by its job alone.

    `max_members`: how many are trained at once; None: as many as the memory bears, on a CPU at most
    64. The caller's thread does the training and receives Ctrl-C.
    """

    def __init__(self, max_members: int | None = None) -> None:
        self.max_members = max_members
        self._limit = max_members or MAX_CPU_MEMBERS
        self._pending: deque[Job[Any]] = deque()
        self._parked: list[Job[Any]] = []
        self._datasets: WeakValueDictionary[str, Any] = WeakValueDictionary()
        self._samples: WeakKeyDictionary[Any, dict[str, tuple[Samples, Samples | None]]]
        self._samples = WeakKeyDictionary()
        self._device_samples: WeakKeyDictionary[Samples, dict[torch.device, Samples]]
        self._device_samples = WeakKeyDictionary()
        self._accepted_configs: set[str] = set()
        self._running: Job[Any] | None = None
        self.display = FleetDisplay(0)

    def run(self, functions: Sequence[Callable[[], T]]) -> list[Job[T]]:
        """Run all jobs; return them in order, each with its `result` or its `error`.

        Ctrl-C stops all trainings, whose jobs receive TrainingInterrupted, and is then raised.
        """
        with use_fleet(self):  # a job runs in a copy of the context in which it is made
            jobs = [Job(number, function) for number, function in enumerate(functions)]
        self._pending.extend(jobs)
        self.display = FleetDisplay(len(jobs))
        try:
            with quiet_lightning():  # once: each change of a level takes milliseconds
                while self._pending or self._parked:
                    self._start_jobs()
                    if self._parked:
                        self._train_group()
        except KeyboardInterrupt as stop:
            self._stop_jobs(stop)
            raise
        finally:
            if self.display.num_members > 1:
                log.info("fleet: %s", self.display.summary)
        return jobs

    # -- what fits ask the fleet, in the thread of their job -----------------------------------

    def share_dataset(self, config: Any, build: Callable[[], Any]) -> Any:
        """Return the dataset of a configuration, the same object for all jobs with an equal one."""
        try:
            key = digest(config)
        except (ConfigError, TypeError):  # a live object
            return build()
        dataset = self._datasets.get(key)
        if dataset is None:
            self._datasets[key] = dataset = build()
        return dataset

    def check_once(self, config: Any, check: Callable[[], None]) -> None:
        """Check a configuration unless an equal one has passed the check in this fleet."""
        try:
            key = digest(config)
        except (ConfigError, TypeError):  # a live object
            check()
            return
        if key not in self._accepted_configs:
            check()
            self._accepted_configs.add(key)

    def share_samples(
        self, dataset: Any, reweighter: Any, load: Callable[[], tuple[Samples, Samples | None]]
    ) -> tuple[Samples, Samples | None]:
        """Return the samples of a dataset, the same for all jobs with equal reweighters."""
        samples = self._samples.setdefault(dataset, {})
        key = "" if reweighter is None else _describe(reweighter)
        if key not in samples:
            samples[key] = load()
        return samples[key]

    def fit(self, inputs: FitInputs, recorder: TrainingRecorder | None) -> FitResult | None:
        """Fit as a member of the fleet; None if the caller has to fit by itself."""
        job = self._running
        assert job is not None
        network = Member.build_network(inputs)
        reason = find_refusal(inputs, network)
        if reason is not None:
            log.info("job %d is fitted by itself: a fleet cannot have %s", job.number, reason)
            self.display.hide()  # the fit may have a progress bar of its own
            return None
        inputs.train = self._move(inputs.train, inputs.device)
        if inputs.valid is not None:
            inputs.valid = self._move(inputs.valid, inputs.device)
        member = Member.create(job.number, inputs, network)
        with ExitStack() as stack:
            member.folder = _enter_folder(stack, inputs.recipe, recorder)
            member.recorder = name_curves(recorder, member.folder, "fit", member.identity)
            if member.folder is not None and isinstance(member.recorder, NamedCurves):
                member.folder = stack.enter_context(
                    hold_folder(member.folder / member.recorder.name)
                )
            if member.folder is not None and (member.folder / LAST).is_file():
                log.info("job %d has a checkpoint of a fit by itself, and continues so", job.number)
                self.display.hide()
                return None
            answer: FitResult = job.request_answer(member)
            return answer

    def _move(self, samples: Samples, device: torch.device) -> Samples:
        """Return samples on the device, the same ones for all members that share them."""
        moved = self._device_samples.setdefault(samples, {})
        if device not in moved:
            moved[device] = samples.to(device)
        return moved[device]

    # -- jobs ----------------------------------------------------------------------------------

    def _start_jobs(self, busy: int = 0) -> None:
        """Start jobs until as many wait (or are trained, `busy`) as the limit allows."""
        while self._pending and busy + len(self._parked) < self._limit:
            self._advance(self._pending.popleft())

    def _advance(self, job: Job[Any], answer: Any = None) -> None:
        """Let a job run to its fit, which then waits in `_parked`, or to its end."""
        self._running = job
        try:
            with preserve_generators():
                job.advance(answer)
        finally:
            self._running = None
            if job.is_ended:
                self.display.count_job(job.number, job.error)
            else:
                self._parked.append(job)

    def _stop_jobs(self, stop: BaseException) -> None:
        self._pending.clear()
        while self._parked:
            job = self._parked.pop()
            member: Member = job.request
            self._advance(job, _interruption(member, stop))

    # -- training ------------------------------------------------------------------------------

    def _train_group(self) -> None:
        """Train all members of the first waiting job's architecture."""
        key = self._parked[0].request.key
        first: Member = self._parked[0].request
        recipe = first.inputs.recipe
        with (
            preserve_generators(),
            reuse_freed_memory(),
            numerical_settings(recipe.trainer, recipe.matmul_precision),
            self.display.on_screen(is_enabled=recipe.trainer.shows_progress_bar),
            Interruption() as interruption,
        ):
            self._find_limit(key)
            training = FleetTraining(first, first.inputs.device, self.display.count_samples)
            jobs: dict[int, Job[Any]] = {}
            try:
                self._enter(training, key, jobs)
                log.info(
                    "fleet of %d members with %s parameters each on %s",
                    len(training.members),
                    f"{sum(training.layout.sizes):,}",
                    first.inputs.device,
                )
                while training.members:
                    if any(member.is_finished for member in training.members):
                        self._end_members(training, jobs)  # a checkpoint was that of their end
                    else:
                        self._run_round(training, jobs, interruption)
                    self._start_jobs(busy=len(training.members))
                    self._enter(training, key, jobs)
            except BaseException:
                self._parked += jobs.values()  # to be stopped
                raise

    def _find_limit(self, key: Any) -> None:
        """Find how many members fit into the memory of a GPU, from a step of one and of two."""
        members = [j.request for j in self._parked if j.request.key == key]
        device = members[0].inputs.device
        if self.max_members is not None or device.type != "cuda" or len(members) < 2:
            return
        used = [_peak_bytes(members[:count], device) for count in (1, 2)]
        each = max(1, used[1] - used[0])
        free = torch.cuda.mem_get_info(device)[0]
        self._limit = max(1, int(MEMORY_SHARE * free / each))

    def _enter(self, training: FleetTraining, key: Any, jobs: dict[int, Job[Any]]) -> None:
        """Let waiting members of the same architecture take the free places."""
        waiting = [j for j in self._parked if j.request.key == key]
        newcomers = waiting[: self._limit - len(training.members)]
        for job in newcomers:
            self._parked.remove(job)
            jobs[job.number] = job
        members = [job.request for job in newcomers]
        states = [
            None if m.folder is None else load_member(m.folder, m, training.layout, training.device)
            for m in members
        ]
        training.enter(members, states)

    def _run_round(
        self, training: FleetTraining, jobs: dict[int, Job[Any]], interruption: Interruption
    ) -> None:
        begin, members = time.perf_counter(), list(training.members)
        self.display.begin_round(members)
        if not training.run_round(interruption.is_requested):
            raise KeyboardInterrupt
        self.display.end_round()
        training_seconds = time.perf_counter() - begin
        self._save(training)
        num_finished = sum(member.is_finished for member in members)
        best_values = self.display.best_values
        log.info(
            "round %d: %d members, %d of them ended, %d waiting%s; %s samples/s (%.2f s)",
            training.num_rounds - 1,
            len(members),
            num_finished,
            len(self._pending) + len(self._parked),
            f"; {best_values}" if best_values else "",
            f"{sum(len(m.train) for m in members) / training_seconds:,.0f}",
            training_seconds,
            extra={"file_only": self.display.is_visible},
        )
        self._end_members(training, jobs)

    def _end_members(self, training: FleetTraining, jobs: dict[int, Job[Any]]) -> None:
        """Take the finished members out of the training, and let their jobs go on."""
        num_members = len(training.members)
        for member in training.remove_finished_members():
            self.display.count_member(member)
            job = jobs.pop(member.number)
            self._advance(job, member.error or _result(member, num_members))

    def _save(self, training: FleetTraining) -> None:
        for place, member in enumerate(training.members):
            if member.folder is not None:
                save_member(member.folder, member, *training.select(place))


def _peak_bytes(members: list[Member], device: torch.device) -> int:
    """Return the largest memory of one training step of these members."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    trial = FleetTraining(members[0], device)
    trial.enter(members, [None] * len(members))
    trial.try_step()
    return int(torch.cuda.max_memory_allocated(device) - before)


def _enter_folder(
    stack: ExitStack, recipe: Recipe, recorder: TrainingRecorder | None
) -> Path | None:
    """Return the folder for a member's checkpoints; None if nothing could resume from it."""
    if recorder is None and recipe.checkpoint.get("dir") is None:
        return None
    return stack.enter_context(checkpoint_folder(recipe, recorder))


def _describe(reweighter: Any) -> str:
    """Return a text that is equal for equal reweighters; that of a live object is its own."""
    try:
        return digest(reweighter.to_config())
    except AttributeError:
        return f"{id(reweighter)}"


def _interruption(member: Member, stop: BaseException) -> TrainingInterrupted:
    """Return the error of a training that was stopped in the middle of an epoch."""
    if member.folder is None or not has_member_checkpoint(member.folder):
        return TrainingInterrupted("training interrupted; no checkpoint was saved.")
    path = member.folder
    return TrainingInterrupted(
        f"training interrupted in epoch {member.epoch}; its last complete epoch is saved in "
        f"{path}. The same call resumes it.",
        str(path),
    )


def _result(member: Member, num_members: int) -> FitResult:
    """Return the result of a member as that of a fit by itself."""
    progress, recipe = member.progress, member.inputs.recipe
    train, valid = member.train, member.valid
    monitor = member.stopping.monitor
    values = [point[monitor] for point in progress.history if monitor in point]
    if values and all(math.isnan(value) for value in values):
        log.warning(
            "job %d: %s was NaN each time: the weights are the last ones, not the best ones.",
            member.number,
            monitor,
        )
    report = {
        "epochs": progress.epochs,
        "best_epoch": progress.best_epoch,
        "best_step": progress.best_step,
        "monitor": monitor,
        "best_value": progress.best_value,
        "seconds": member.seconds,
        "train_seconds": member.seconds,
        "samples": len(train),
        "valid_samples": 0 if valid is None else len(valid),
        "samples_per_second": member.num_samples / member.seconds if member.seconds else 0.0,
        "parameters": sum(p.numel() for p in member.network.parameters()),
        "device": str(train.device),
        "devices": 1,
        "store": train.store,
        "memory": {
            "features": train.num_feature_bytes,
            "weights": sum(p.nbytes for p in member.network.parameters()),
        },
        **describe_numerics(train.device),
        "fleet_members": num_members,
        "seed": recipe.seed,
        "resumed_from": member.resumed_from,
    }
    return FitResult(member.network, progress.history, report, progress.best_optimizer)
