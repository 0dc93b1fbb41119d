"""How a command ends: one clear line for a user's error, exit codes, Ctrl-C."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence

from qtorch.core.errors import QtorchError

DEBUG_VARIABLE = "QTORCH_DEBUG"
INTERRUPTED = 130
# The two lines that an ExpressionError ends with.
_POINTER = re.compile(r"[.:]?\n {4}(?P<line>[^\n]+)\n {4}(?P<before> *)(?P<caret>\^+)")


def debugging() -> bool:
    """Whether errors should show their traceback (`--debug` or QTORCH_DEBUG=1)."""
    return os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


def guarded(command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run a command; an exception becomes one line on stderr and an exit code."""
    arguments = [a for a in argv if a != "--debug"]
    before = os.environ.get(DEBUG_VARIABLE)
    if len(arguments) < len(argv):
        os.environ[DEBUG_VARIABLE] = "1"
    try:
        return command(arguments)
    except KeyboardInterrupt as interrupt:
        print(f"interrupted. {interrupt}".rstrip(), file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        report(error)
        return 1
    finally:
        if before is None:
            os.environ.pop(DEBUG_VARIABLE, None)
        else:
            os.environ[DEBUG_VARIABLE] = before


def report(error: BaseException) -> None:
    """Say on stderr what went wrong; with the traceback where debugging, or for our own bugs."""
    if debugging():
        traceback.print_exception(error)
    print(f"error: {error_line(error)}", file=sys.stderr)


def error_line(error: BaseException) -> str:
    """An error as one line: the message of a known kind, the type too for any other."""
    told = _innermost_known(error)
    text = " ".join(_POINTER.sub(_place, str(told)).split())
    if isinstance(told, QtorchError):
        return text
    if isinstance(told, OSError) and told.errno == errno.ENOSPC:
        where = f" while writing {told.filename}" if told.filename else ""
        return f"the disk is full{where}: {text}. Free some space, then resume the run."
    if isinstance(told, OSError) and told.filename:
        return f"{told.strerror}: {told.filename}"
    return f"{type(told).__name__}: {text} (QTORCH_DEBUG=1 shows where)"


def _place(found: re.Match[str]) -> str:
    """What a caret under an expression points at, said in words: carets need lines."""
    line, begin = found["line"], len(found["before"])
    marked = line[begin : begin + len(found["caret"])]
    where = f"{marked!r}, character {begin + 1}" if marked.strip() else "the end"
    return f": {where} of {line!r}"


def _innermost_known(error: BaseException) -> BaseException:
    """The cause that a user can act on: Hydra and Lightning wrap ours in theirs."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, QtorchError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return error
