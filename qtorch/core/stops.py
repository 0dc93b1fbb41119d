"""The signals that ask a process to stop in order, keeping what it has."""

from __future__ import annotations

import signal

# A scheduler's notice that the process will be ended soon: SLURM's `--signal` and `scancel`,
# Kubernetes, Ray. It comes once or several times, and means the same however often it comes.
NOTICES = (signal.SIGTERM, signal.SIGUSR1)
# A terminal's Ctrl-C asks for the same; the second one is meant: end at once.
STOPS = (signal.SIGINT, *NOTICES)

_answered: int | None = None


def answer(number: int | None) -> None:
    """Note the signal that is being answered by who stands in for the process's own handlers (a
    training): they need not interrupt the work again when they have their signals back. None
    begins anew."""
    global _answered
    _answered = number


def answered() -> int | None:
    """The signal that was answered so, if one was."""
    return _answered
