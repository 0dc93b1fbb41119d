"""The signals that ask a process to stop in order, keeping what it has."""

from __future__ import annotations

import signal
from dataclasses import dataclass

# A scheduler's notice that the process will be ended soon: SLURM's `--signal` and `scancel`,
# Kubernetes, Ray. It comes once or several times, and means the same however often it comes.
NOTICES = (signal.SIGTERM, signal.SIGUSR1)
# A terminal's Ctrl-C asks for the same; the second one is meant: end at once.
STOPS = (signal.SIGINT, *NOTICES)


@dataclass
class Noted:
    """What became of the stops of this process; a command or a worker begins with none.

    `asked`: the signal on which the process's own handler has interrupted the work. An exception
    that a handler raises may come into a destructor, which loses it: work that goes on
    nevertheless finds here that it should not. `answered`: the signal that a training, which
    stands in for those handlers, answers by a checkpoint and an error of its own: nothing needs
    to be interrupted again.
    """

    asked: int | None = None
    answered: int | None = None

    def clear(self) -> None:
        """Begin anew."""
        self.asked = self.answered = None


noted = Noted()
