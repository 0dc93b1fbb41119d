"""One task in one process of its own, whose memory goes when it ends.

The child is started as `python -m qtorch.trainer.isolated REQUEST REPLY`: unlike a spawned
worker of `multiprocessing` it never imports the caller's main script again, so a script without
a main guard works.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qtorch.core.errors import ConfigError, QtorchError
from qtorch.core.session import init, session
from qtorch.tracking.r import R
from qtorch.tracking.recorder import Recorder
from qtorch.trainer.failure import note_started, one_line, record_failure, started_runs

GRACE_SECONDS = 30.0


class IsolatedError(QtorchError, RuntimeError):
    """A task's process failed; the message is the error's, or how the process ended."""


def call_isolated(
    function: Callable[..., Recorder], first: Any, experiment_name: str | None, **options: Any
) -> Recorder:
    """`function(first, experiment_name, **options)` in a child process; returns the run.

    The child inherits the session's defaults, the tracking store and the working folder. Raises
    IsolatedError with the child's error; the run that it had started is told to `started_runs`.
    """
    with tempfile.TemporaryDirectory(prefix="qtorch-task-") as folder:
        request, reply = Path(folder, "request"), Path(folder, "reply")
        request.write_bytes(_pickled(function, first, experiment_name, options))
        code = _wait([sys.executable, "-m", __name__, str(request), str(reply)])
        told = json.loads(reply.read_text()) if reply.is_file() else {}
    recorder = None
    if "recorder_id" in told:
        recorder = R.get_recorder(
            recorder_id=told["recorder_id"], experiment_id=told["experiment_id"]
        )
        note_started(recorder)
    if code == 0 and recorder is not None:
        return recorder
    if "error" in told:
        raise IsolatedError(told["error"])
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    lost = IsolatedError(f"the task's process {how} without a result.")
    if recorder is not None:  # nobody else can close its run: the process is gone
        record_failure(recorder, lost)
        recorder.end_run(Recorder.STATUS_FA)
    raise lost


def _pickled(
    function: Callable[..., Recorder],
    first: Any,
    experiment_name: str | None,
    options: Mapping[str, Any],
) -> bytes:
    if getattr(function, "__module__", None) == "__main__":
        raise ConfigError(
            f"{getattr(function, '__qualname__', function)} is defined in the script itself, which "
            "a task's own process does not run; put it into a module and import it."
        )
    recorder_ids = None
    if isinstance(first, Recorder):
        recorder_ids = (first.id, first.experiment_id)
    try:
        # The first entry is sys.path: what follows may name modules of the caller's folders.
        head = pickle.dumps((sys.path, session(), R.get_uri()))
        given = None if recorder_ids else first
        body = pickle.dumps((function, given, recorder_ids, experiment_name, dict(options)))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"the task cannot be sent to a process of its own: {error}. Describe its parts by "
            "configuration ('_target_') instead of live objects."
        ) from error
    return pickle.dumps((head, body))


def _wait(command: list[str]) -> int:
    child = subprocess.Popen(command)
    try:
        return child.wait()
    except KeyboardInterrupt:
        # The terminal sent Ctrl-C to the child too; it closes its run before it ends.
        try:
            child.wait(GRACE_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            child.kill()
            child.wait()
        raise


def _main(request: str, reply: str) -> int:
    """The child's side."""
    head, body = pickle.loads(Path(request).read_bytes())  # written by the parent a moment ago
    path, defaults, uri = pickle.loads(head)
    sys.path[:] = path
    init(**{k: v for k, v in vars(defaults).items() if v is not None})
    R.set_uri(uri)
    function, first, recorder_ids, experiment_name, options = pickle.loads(body)
    if recorder_ids is not None:
        first = R.get_recorder(recorder_id=recorder_ids[0], experiment_id=recorder_ids[1])
    told: dict[str, Any] = {}

    def tell() -> None:
        partial = f"{reply}.partial"
        Path(partial).write_text(json.dumps(told))
        os.replace(partial, reply)

    class Told(list[Recorder]):
        """Tells of a run the moment it starts: a killed process cannot any more."""

        def append(self, recorder: Recorder) -> None:
            super().append(recorder)
            told.update(recorder_id=recorder.id, experiment_id=recorder.experiment_id)
            tell()

    with started_runs(Told()):
        try:
            recorder = function(first, experiment_name, **options)
        except Exception as error:
            told["error"] = one_line(error)
            tell()
            return 1
    told.update(recorder_id=recorder.id, experiment_id=recorder.experiment_id)
    tell()
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
