"""Each task in one process of its own, whose memory goes when it ends.

The processes are forked from a zygote: none repeats the imports, and none imports the caller's
main script, so a script without a main guard works.
"""

from __future__ import annotations

import base64
import pickle
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from qtorch.core.errors import ConfigError, QtorchError
from qtorch.core.heartbeat import RUN, listening
from qtorch.core.session import init, session
from qtorch.task.forked import TRAINING, Forks
from qtorch.tracking.r import R
from qtorch.tracking.recorder import Recorder
from qtorch.trainer.failure import note_started, one_line, record_failure

Tell = Callable[[dict[str, Any]], None]


class IsolatedError(QtorchError, RuntimeError):
    """A task's process failed; the message is the error's, or how the process ended."""


class LostProcess(QtorchError, RuntimeError):
    """A task's process ended without a word."""


class Isolation:
    """`isolation(function, first, experiment_name, **options)`: the call, in a child process.

    Children inherit the session's defaults, the tracking store and the working folder. The
    zygote starts with the first call and ends with the `with` block.
    """

    def __init__(self) -> None:
        self._forks: Forks | None = None

    def __enter__(self) -> Isolation:
        return self

    def __exit__(self, *_: object) -> None:
        if self._forks is not None:
            self._forks.close()
            self._forks = None

    def __call__(
        self,
        function: Callable[..., Recorder],
        first: Any,
        experiment_name: str | None,
        **options: Any,
    ) -> Recorder:
        """The run that the function returns.

        Raises IsolatedError with the child's error; the run that it had started is told to
        `started_runs`.
        """
        call = _pickled(function, first, experiment_name, options)
        if self._forks is None:
            self._forks = Forks(*TRAINING)
        told: dict[str, Any] = {}
        ended = self._forks.call(f"{__name__}.work_here", {"call": call}, told.update)
        recorder = None
        if RUN in told:
            recorder = R.get_recorder(
                recorder_id=told[RUN]["recorder_id"], experiment_id=told[RUN]["experiment_id"]
            )
            note_started(recorder)
        if ended.code == 0 and recorder is not None:
            return recorder
        if "error" in told:
            raise IsolatedError(told["error"])
        message = f"the task's process {ended.how} without a result."
        if recorder is not None:
            close_run(recorder, message)
        raise IsolatedError(message)


def _pickled(
    function: Callable[..., Recorder],
    first: Any,
    experiment_name: str | None,
    options: Mapping[str, Any],
) -> str:
    if getattr(function, "__module__", None) == "__main__":
        raise ConfigError(
            f"{getattr(function, '__qualname__', function)} is defined in the script itself, which "
            "a task's own process does not run; put it into a module and import it."
        )
    recorder_ids = (first.id, first.experiment_id) if isinstance(first, Recorder) else None
    given = first if recorder_ids is None else None
    here = {k: v for k, v in vars(session()).items() if v is not None}
    call = (here, R.get_uri(), function, given, recorder_ids, experiment_name, dict(options))
    try:
        return base64.b64encode(pickle.dumps(call)).decode()
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"the task cannot be sent to a process of its own: {error}. Describe its parts by "
            "configuration ('_target_') instead of live objects."
        ) from error


def work_here(request: Mapping[str, Any], tell: Tell) -> int:
    """The child's side of a call; tells of its run, and of its error."""
    try:
        call = pickle.loads(base64.b64decode(request["call"]))  # the owner's own, a moment ago
        defaults, uri, function, first, recorder_ids, experiment_name, options = call
        init(**defaults)
        R.set_uri(uri)
        if recorder_ids is not None:
            first = R.get_recorder(recorder_id=recorder_ids[0], experiment_id=recorder_ids[1])
        with telling_of_runs(tell):
            recorder = function(first, experiment_name, **options)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        tell({"error": one_line(error)})
        return 1
    tell({RUN: {"recorder_id": recorder.id, "experiment_id": recorder.experiment_id}})
    return 0


@contextmanager
def telling_of_runs(tell: Tell) -> Iterator[None]:
    """Tell of a run the moment it starts, `{"run": its ids}`: a killed process cannot any more."""

    def on_beat(stage: str, details: dict[str, Any]) -> None:
        if stage == RUN:
            tell({RUN: details})

    with listening(on_beat):
        yield


def close_run(recorder: Recorder, message: str) -> None:
    """Mark the run of a process that is gone FAILED, if it still counts as running."""
    if recorder.status == Recorder.STATUS_R:
        record_failure(recorder, LostProcess(message))
        recorder.end_run(Recorder.STATUS_FA)
