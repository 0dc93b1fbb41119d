"""A CUDA graph of the training step: one launch in place of hundreds.

The host starts each kernel of an ordinary step by itself, which takes longer than a small network
computes. A graph is recorded once and then replayed: the same kernels read and write the same
memory. So a step can be one only if its shapes and addresses never change, the host reads nothing
from the device, and no number of the host (such as a learning rate) changes from step to step.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qtorch.core.errors import ConfigError
from qtorch.data.dataset.batch import Batch

log = logging.getLogger(__name__)

GraphMode = bool | Literal["auto"]
Sums = tuple[Tensor, Tensor | int]  # of a batch: sum of weight x loss, sum of weight
Step = Callable[[Batch], Sums]

# One stream for each device, because cuBLAS keeps memory for each stream that it has been used on.
_streams: dict[torch.device, torch.cuda.Stream] = {}

OPTIMIZERS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
NUM_FIRST_STEPS = 3  # libraries choose kernels and allocate memory in the first steps
# What a replayed step may differ from an ordinary one, where kernels add in an order of their own.
RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE = 1e-5, 1e-6


def check_cuda_graph(mode: Any) -> None:
    """Raise ConfigError for a wrong argument `cuda_graph`."""
    if not (isinstance(mode, bool) or mode == "auto"):
        raise ConfigError(f"cuda_graph is {mode!r}; expected 'auto', true or false.")


class GraphError(Exception):
    """A training step could not be recorded, or its replay differs from it."""


class StepGraph:
    """A recorded training step for batches of one shape.

    `step` runs a whole training step: forward, backward and the optimizer's update. It must have
    run before, so that everything that it allocates only once exists.
    """

    def __init__(self, step: Step, optimizer: Optimizer, batch: Batch) -> None:
        self._step, self._optimizer = step, optimizer
        self._batch = batch.map_tensors(torch.clone)  # the graph reads its batches here
        self._inputs = self._batch.tensors()
        self._capture()

    def run(self, batch: Batch) -> Sums | None:
        """Run the step on a batch; None if its shape or a learning rate is not the recorded one.

        The next run overwrites the tensors of the result.
        """
        tensors = batch.tensors()
        is_of_recorded_shape = len(tensors) == len(self._inputs) and all(
            tensor.shape == own.shape and tensor.dtype == own.dtype
            for tensor, own in zip(tensors, self._inputs, strict=True)
        )
        if not is_of_recorded_shape or _learning_rates(self._optimizer) != self._recorded_rates:
            return None
        torch._foreach_copy_(self._inputs, tensors)
        self._graph.replay()
        return self._sums

    def follow_settings(self) -> None:
        """Record the step again if the optimizer has other settings, such as a learning rate."""
        if _settings(self._optimizer) != self._recorded_settings:
            self._capture()

    def _capture(self) -> None:
        self._recorded_settings = _settings(self._optimizer)
        self._recorded_rates = _learning_rates(self._optimizer)
        graph = torch.cuda.CUDAGraph()
        device = self._inputs[0].device
        current = torch.cuda.current_stream(device)
        try:
            with _allow_capture(self._optimizer), _recording(graph, device):
                self._sums = self._step(self._batch)
        except BaseException:
            torch.cuda.set_stream(current)  # torch leaves the recorded one
            self._optimizer.zero_grad()
            _end_recording(device)
            raise
        self._graph = graph


def _recording(graph: torch.cuda.CUDAGraph, device: torch.device) -> Any:
    """Return a context manager that records what the host starts inside the block."""
    # Other threads, such as those that send metrics, may go on using the device.
    return torch.cuda.graph(graph, stream=_get_stream(device), capture_error_mode="thread_local")


def _get_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of recordings."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # untyped in torch
    return _streams[device]


def _end_recording(device: torch.device) -> None:
    """Let the random generator of a device leave the recording that an error has ended.

    Otherwise "Offset increment outside graph capture encountered unexpectedly" ends the next
    dropout. It leaves with the end of a recording without errors.
    """
    with _recording(torch.cuda.CUDAGraph(), device):
        torch.zeros(1, device=device)


def _learning_rates(optimizer: Optimizer) -> list[Any]:
    return [group["lr"] for group in optimizer.param_groups]


def _settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return a copy of the numbers that a recorded step of the optimizer contains."""
    return [
        {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]


def find_optimizer_obstacle(optimizer: Optimizer) -> str | None:
    """Return why the steps of an optimizer cannot be recorded, None if they can be."""
    groups, name = optimizer.param_groups, type(optimizer).__name__
    if type(optimizer) not in OPTIMIZERS or not all(group.get("fused") for group in groups):
        return f"the optimizer {name} is no fused Adam, AdamW or SGD"
    if any(isinstance(group["lr"], Tensor) for group in groups):
        return "the learning rate is a tensor"
    if any(group.get("dampening") for group in groups):
        return "the first step with dampening differs from the others"
    return None


@contextmanager
def _allow_capture(optimizer: Optimizer) -> Iterator[None]:
    """Context manager: torch lets a fused optimizer be recorded.

    Its state is on the device in any case, but torch only accepts the declaration `capturable`.
    """
    groups = [group for group in optimizer.param_groups if "capturable" in group]
    previous = [group["capturable"] for group in groups]
    try:
        for group in groups:
            group["capturable"] = True
        yield
    finally:
        for group, value in zip(groups, previous, strict=True):
            group["capturable"] = value


class _TrainingState:
    """A copy of all that a training step changes.

    That is the weights and buffers of a module, the optimizer's state and the random generators.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer, device: torch.device) -> None:
        self._module, self._optimizer, self._device = module, optimizer, device
        self._is_new = not optimizer.state
        self._weights = _clone(self._weight_tensors())
        self._moments = _clone(self._moment_tensors())
        self._random_states = torch.get_rng_state(), torch.cuda.get_rng_state(device)

    def _weight_tensors(self) -> list[Tensor]:
        return [*self._module.parameters(), *self._module.buffers()]

    def _moment_tensors(self) -> list[Tensor]:
        states = self._optimizer.state.values()
        return [value for state in states for value in state.values() if isinstance(value, Tensor)]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the state; the moments of a new optimizer become zero, with which it begins."""
        torch.set_rng_state(self._random_states[0])
        torch.cuda.set_rng_state(self._random_states[1], self._device)
        self._optimizer.zero_grad()
        _copy_all(self._weight_tensors(), self._weights)
        if not self._is_new:
            _copy_all(self._moment_tensors(), self._moments)
            return
        for moment in self._moment_tensors():
            moment.zero_()

    def restore_optimizer(self) -> None:
        """Leave a new optimizer without the moments of the steps since then."""
        if self._is_new:
            self._optimizer.state.clear()

    def results(
        self, step: Callable[[Batch], Sums | None], batches: Sequence[Batch]
    ) -> list[Tensor]:
        """Return all tensors after steps that begin with this state, and the loss of each step."""
        self.restore()
        losses = []
        for batch in batches:
            sums = step(batch)
            assert sums is not None, "all batches have the recorded shape"
            losses.append(sums[0].clone())
        return [*_clone(self._weight_tensors()), *_clone(self._moment_tensors()), *losses]


def _clone(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def _copy_all(targets: list[Tensor], values: list[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def record_checked_step(
    step: Step, module: nn.Module, optimizer: Optimizer, batch: Batch
) -> StepGraph:
    """Record the training step, and compare its replay with ordinary steps.

    Both train on the same two batches from the same state, which is the state afterwards as well.
    Waits for the device. Raises GraphError if the step cannot be recorded or its replay differs,
    and any other error only if the state could not be restored.
    """
    state = _TrainingState(module, optimizer, batch.x.device)
    # A graph that kept to the batch that it was recorded with would be noticed by another one.
    batches = [replace(batch, x=batch.x.flip(0)), batch]
    try:
        _run_first_steps(step, batch)
        expected = state.results(step, batches)
        state.restore()
        graph = StepGraph(step, optimizer, batch)
        _check_equal(state.results(graph.run, batches), expected)
    except BaseException as error:
        state.restore()
        state.restore_optimizer()
        if isinstance(error, Exception):  # whatever it is, ordinary steps do not need the graph
            raise GraphError(_describe(error)) from error
        raise
    state.restore()
    return graph


def _run_first_steps(step: Step, batch: Batch) -> None:
    """Run ordinary steps on the stream of recordings, as torch asks for before a recording."""
    current, stream = torch.cuda.current_stream(batch.x.device), _get_stream(batch.x.device)
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            for _ in range(NUM_FIRST_STEPS):
                step(batch)
    finally:
        current.wait_stream(stream)


def _check_equal(results: list[Tensor], expected: list[Tensor]) -> None:
    """Raise ValueError if the results of replayed steps are not those of ordinary steps."""
    for result, value in zip(results, expected, strict=True):
        if not torch.allclose(
            result.double(),
            value.double(),
            rtol=RELATIVE_TOLERANCE,
            atol=ABSOLUTE_TOLERANCE,
            equal_nan=True,
        ):
            difference = float((result.double() - value.double()).abs().max())
            raise ValueError(
                f"its replay differs from ordinary steps by {difference:.3g} in a tensor of shape "
                f"{list(value.shape)}"
            )


class GraphedStep:
    """The option `cuda_graph` of a training: the graph of its step, or why there is none.

    `obstacle` says why the step of this training cannot be a graph, None if it may be one. "auto"
    then uses ordinary steps, and True raises ConfigError.
    """

    def __init__(self, mode: GraphMode, obstacle: str | None) -> None:
        self._mode = mode
        self._graph: StepGraph | None = None
        self.is_on = mode is not False
        self.description = "off"
        if self.is_on and obstacle is not None:
            self.refuse(obstacle)

    def record(
        self, step: Step, module: nn.Module, optimizer: Optimizer, load_batch: Callable[[], Batch]
    ) -> None:
        """Record the step before the first one; `load_batch` returns a batch of the usual shape.

        `module` has all weights and buffers that the step changes.
        """
        obstacle = find_optimizer_obstacle(optimizer)
        if obstacle is not None:
            self.refuse(obstacle)
            return
        try:
            self._graph = record_checked_step(step, module, optimizer, load_batch())
        except GraphError as error:
            self.refuse(str(error))
        else:
            self.description = "used"

    def begin_epoch(self) -> None:
        """Take over the settings of the optimizer, which do not change within an epoch."""
        if self._graph is None:
            return
        try:
            self._graph.follow_settings()
        except Exception as error:  # a recording changes nothing that ordinary steps need
            self._graph = None
            self.refuse(_describe(error))

    def run(self, batch: Batch) -> Sums | None:
        """Run the training step on a batch by the graph; None if there is none for it."""
        return None if self._graph is None else self._graph.run(batch)

    def release(self) -> None:
        """Free the memory of the graph."""
        self._graph = None

    def refuse(self, reason: str) -> None:
        """Use ordinary steps for a reason, which the log and the report of the fit name."""
        if self._mode is True:
            raise ConfigError(f"cuda_graph=true is not possible: {reason}.")
        log.info("no CUDA graph of the training step: %s", reason)
        self.description, self.is_on = f"not used: {reason}", False


def _describe(error: Exception) -> str:
    """Return the type and the first line of an error."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
