"""Run each task in a separate process, so that its memory is released when it ends.

The processes come from a fork server: they do not repeat the imports, and they do not import the
caller's main script, so scripts need no `if __name__ == "__main__"` guard.
"""

from __future__ import annotations

import base64
import logging
import pickle
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from qtorch.core.errors import ConfigError, QtorchError, RunHeldError
from qtorch.core.session import session, set_defaults
from qtorch.process.child import Parent
from qtorch.process.fork_server import TRAINING_PRELOAD, fork_server
from qtorch.process.heartbeat import RUN, listen
from qtorch.tracking.claims import is_run_held
from qtorch.tracking.manager import R
from qtorch.tracking.recorder import Recorder
from qtorch.trainer.failure import announce_run, error_summary, record_failure

log = logging.getLogger(__name__)


class IsolatedError(QtorchError, RuntimeError):
    """A task failed in its process; the message is the task's error or how the process ended."""


class ProcessLostError(QtorchError, RuntimeError):
    """A task's process ended without reporting a result or an error."""


def train_in_child(
    function: Callable[..., Recorder], first: Any, experiment_name: str | None, **options: Any
) -> Recorder:
    """Call `function(first, experiment_name, **options)` in a child; return the run it returns.

    The child inherits the session's defaults, the tracking store and the working folder. Raises
    IsolatedError with the child's error; a run that the child had started is reported to
    `collect_started_runs`, also after an interruption.
    """
    call = _pickle_call(function, first, experiment_name, options)
    replies: dict[str, Any] = {}
    server = fork_server(TRAINING_PRELOAD)
    try:
        exit_status = server.call(f"{__name__}.serve_call", {"call": call}, replies.update)
    except (KeyboardInterrupt, SystemExit):
        try:
            _announce_child_run(replies)
        except QtorchError as error:
            log.warning("cannot find the run of the interrupted task: %s", error)
        raise
    recorder = _announce_child_run(replies)
    if exit_status.code == 0 and recorder is not None:
        return recorder
    if "run_held" in replies:
        raise RunHeldError(replies["run_held"])
    if "error" in replies:
        raise IsolatedError(replies["error"])
    ending = "" if exit_status.is_refused else " without returning a result"
    message = f"the task's process {exit_status.description}{ending}."
    if recorder is not None:
        fail_run(recorder, message)
    raise IsolatedError(message)


def _announce_child_run(replies: Mapping[str, Any]) -> Recorder | None:
    """Report the run that the child has started, if any, and return it."""
    if RUN not in replies:
        return None
    recorder = R.get_recorder(
        recorder_id=replies[RUN]["recorder_id"], experiment_id=replies[RUN]["experiment_id"]
    )
    announce_run(recorder)
    return recorder


def _pickle_call(
    function: Callable[..., Recorder],
    first: Any,
    experiment_name: str | None,
    options: Mapping[str, Any],
) -> str:
    if getattr(function, "__module__", None) == "__main__":
        raise ConfigError(
            f"{getattr(function, '__qualname__', function)} is defined in the main script, which "
            "the child process does not import; move it into a module."
        )
    recorder_ids = (first.id, first.experiment_id) if isinstance(first, Recorder) else None
    plain_first = first if recorder_ids is None else None
    session_defaults = {k: v for k, v in vars(session()).items() if v is not None}
    call = (
        session_defaults,
        R.get_uri(),
        function,
        plain_first,
        recorder_ids,
        experiment_name,
        dict(options),
    )
    try:
        return base64.b64encode(pickle.dumps(call)).decode()
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"the task cannot be pickled for a child process: {error}. Describe its parts by "
            "configurations ('_target_') instead of live objects."
        ) from error


def serve_call(request: Mapping[str, Any], parent: Parent) -> int:
    """Run a pickled call in the child process and report its run and its error."""
    try:
        call = pickle.loads(
            base64.b64decode(request["call"])
        )  # trusted: the parent process pickled it
        session_defaults, uri, function, first, recorder_ids, experiment_name, options = call
        set_defaults(**session_defaults)
        R.set_uri(uri)
        if recorder_ids is not None:
            first = R.get_recorder(recorder_id=recorder_ids[0], experiment_id=recorder_ids[1])
        with report_started_runs(parent):
            recorder = function(first, experiment_name, **options)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except RunHeldError as error:
        parent.send({"run_held": str(error)})
        return 1
    except Exception as error:
        parent.send({"error": error_summary(error)})
        return 1
    parent.send({RUN: {"recorder_id": recorder.id, "experiment_id": recorder.experiment_id}})
    return 0


@contextmanager
def report_started_runs(parent: Parent) -> Iterator[None]:
    """Report each run as `{"run": its IDs}` when it starts; a killed process could not later."""

    def on_beat(stage: str, details: dict[str, Any]) -> None:
        if stage == RUN:
            parent.send({RUN: details})

    with listen(on_beat):
        yield


def fail_run(recorder: Recorder, message: str) -> None:
    """Mark the run of a dead process as FAILED if its status is still running.

    A run that another process has resumed in the meantime stays unchanged.
    """
    if recorder.status == Recorder.STATUS_R and not is_run_held(str(recorder.id), recorder.uri):
        record_failure(recorder, ProcessLostError(message))
        recorder.end_run(Recorder.STATUS_FA)
