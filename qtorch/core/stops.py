"""The signals that ask a process to stop in order, keeping what it has."""

from __future__ import annotations

import signal

# A scheduler's notice that the process will be ended soon: SLURM's `--signal` and `scancel`,
# Kubernetes, Ray. It comes once or several times, and means the same however often it comes.
NOTICES = (signal.SIGTERM, signal.SIGUSR1)
# A terminal's Ctrl-C asks for the same; the second one is meant: end at once.
STOPS = (signal.SIGINT, *NOTICES)
