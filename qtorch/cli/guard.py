"""The process of a command: its log and store, one-line errors, exit codes, stop signals."""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from qtorch.core.errors import QtorchError, printable_text
from qtorch.core.runtime import change_environment, configure_logging
from qtorch.core.secrets import redact_urls
from qtorch.core.session import PICKLE_VARIABLE, set_defaults
from qtorch.process.stops import StopSignals

DEBUG_VARIABLE = "QTORCH_DEBUG"
# Words that every command accepts, and the variables that also tell child processes about them.
SWITCHES = {"--debug": DEBUG_VARIABLE, "trusted_pickle=true": PICKLE_VARIABLE}
INTERRUPTED = 130
# An ExpressionError ends with two lines: the expression, and carets under the wrong part.
_POINTER = re.compile(r"[.:]?\n {4}(?P<line>[^\n]+)\n {4}(?P<before> *)(?P<caret>\^+)")


def is_debug_enabled() -> bool:
    """Whether errors show their traceback (`--debug` or QTORCH_DEBUG=1)."""
    return os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


def configure_process(log_level: int | str = logging.INFO, tracking_uri: str | None = None) -> None:
    """Set the log's level and the tracking store (None: the default one) of this process.

    Messages of libraries that carry no news, or that repeat an exception, are silenced.
    """
    configure_logging(log_level)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # caused by Lightning's use of torch
    if not is_debug_enabled():
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL + 1)
    if tracking_uri is not None:
        set_defaults(tracking_uri=tracking_uri)


def run_command(command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run a command; turn an exception into one line on stderr and an exit code."""
    switches = {v: "1" for word, v in SWITCHES.items() if word in argv}
    try:
        with change_environment(switches):
            return command([a for a in argv if a not in SWITCHES])
    except KeyboardInterrupt as interrupt:
        print(redact_urls(f"interrupted. {interrupt}".rstrip()), file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        with change_environment(switches):
            print_error(error)
        return 1


def print_error(error: BaseException) -> None:
    """Print an error to stderr, with its traceback if debugging is enabled."""
    if is_debug_enabled():
        text = redact_urls("".join(traceback.format_exception(error)))
        print(printable_text(text), file=sys.stderr)
    print(f"error: {error_line(error)}", file=sys.stderr)


def error_line(error: BaseException) -> str:
    """Format an error as one line, without secrets and commands of the terminal.

    The type is prepended unless it is one of ours.
    """
    return printable_text(redact_urls(_describe_error(_find_qtorch_error(error))))


def _describe_error(cause: BaseException) -> str:
    text = " ".join(_POINTER.sub(_describe_position, str(cause)).split())
    if isinstance(cause, QtorchError):
        return text
    if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
        file_text = f" while writing {cause.filename}" if cause.filename else ""
        return f"the disk is full{file_text}: {text}. Free some space, then resume the run."
    if isinstance(cause, OSError) and cause.filename:
        return f"{cause.strerror}: {cause.filename}"
    return f"{type(cause).__name__}: {text} (set QTORCH_DEBUG=1 for the traceback)"


def _describe_position(match: re.Match[str]) -> str:
    """Describe in words which part of an expression the carets mark: carets need several lines."""
    line, start = match["line"], len(match["before"])
    marked_text = line[start : start + len(match["caret"])]
    position = f"{marked_text!r}, character {start + 1}" if marked_text.strip() else "the end"
    return f": {position} of {line!r}"


def _find_qtorch_error(error: BaseException) -> BaseException:
    """Find the qtorch error that Hydra or Lightning has wrapped: users can act on that one."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, QtorchError):
            return current
        is_suppressed = current.__suppress_context__  # by `raise ... from`
        current = current.__cause__ if is_suppressed else current.__context__
    return error


@contextmanager
def handle_stop_signals() -> Iterator[None]:
    """Stop the work in an orderly way on the first stop signal, at once on a second Ctrl-C.

    Outside the main thread this does nothing.
    """

    def stop(number: int) -> None:
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    def exit_immediately() -> None:
        print("interrupted twice: exiting immediately.", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)

    with StopSignals(stop, exit_immediately):
        yield
