"""What a fleet shows while it trains, and its summary at the end."""

from __future__ import annotations

import html
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qtorch.core import runtime
from qtorch.core.terminal import progress_bars
from qtorch.model.loop.callbacks import NOTEBOOK_SECONDS, ipython_display

if TYPE_CHECKING:
    from qtorch.model.fleet.member import Member

MAX_LEADERS = 3  # in one line of text


@dataclass(frozen=True)
class Leader:
    """The best value of a metric so far, and the job that has reached it."""

    metric: str
    value: float
    job: int

    def __str__(self) -> str:
        return f"{self.metric} {self.value:.6g} (job {self.job})"


class Screen(ABC):
    """Where a progress bar with a text is shown."""

    @abstractmethod
    def show(self, position: float, total: int, text: str) -> None:
        """Show the bar, or change it."""

    @abstractmethod
    def hide(self) -> None:
        """Remove the bar; `show` shows it again."""


class TerminalScreen(Screen):
    """A bar on stderr."""

    def __init__(self) -> None:
        self._bars = progress_bars(transient=True)
        self._bar = self._bars.add_task("", total=None)

    def show(self, position: float, total: int, text: str) -> None:
        self._bars.update(self._bar, completed=position, total=total, description=text)
        self._bars.start()

    def hide(self) -> None:
        self._bars.stop()


class NotebookScreen(Screen):
    """A bar in the output of a notebook's cell."""

    def __init__(self) -> None:
        self._display: Any = None

    def show(self, position: float, total: int, text: str) -> None:
        bar = f"<progress value='{position:.3f}' max='{total}'></progress>"
        page = ipython_display().HTML(f"{bar} {html.escape(text)}")
        if self._display is None:
            self._display = ipython_display().display(page, display_id=True)
        else:
            self._display.update(page)

    def hide(self) -> None:
        """The bar stays in the output of the cell, as that of a single training does."""


class FleetDisplay:
    """Counts what the jobs of a fleet have reached, and shows it as one progress bar for all.

    The bar has the numbers of members and jobs, the best values so far and the samples of all
    members in a second. It appears on a terminal or in a notebook once the fleet has trained for
    two seconds. `summary` is for the end.
    """

    def __init__(self, num_jobs: int) -> None:
        self.num_jobs = num_jobs
        self.num_ended = self.num_early_stops = self.num_members = 0
        self.num_samples, self.seconds = 0, 0.0
        self.failed_jobs: set[int] = set()
        self._leaders: dict[tuple[str, str], Leader] = {}
        self._members: Sequence[Member] = ()
        self._round_samples, self._round_size = 0, 1
        self._round_begin = self._last_time = self._begin = time.monotonic()
        self._screen: Screen | None = None
        self.is_visible = False

    @contextmanager
    def on_screen(self, *, is_enabled: bool) -> Iterator[None]:
        """Show the bar inside the block, if it is enabled and there is a place for it."""
        if is_enabled and runtime.is_notebook():
            self._screen = NotebookScreen()
        elif is_enabled and sys.stderr.isatty():
            self._screen = TerminalScreen()
        try:
            yield
        finally:
            self.hide()
            self._screen, self._members = None, ()

    def hide(self) -> None:
        """Remove the bar until the next step: something else is to be shown."""
        if self._screen is not None and self.is_visible:
            self._screen.hide()
        self.is_visible = False

    # -- what happens --------------------------------------------------------------------------

    def begin_round(self, members: Sequence[Member]) -> None:
        """Begin an epoch of these members."""
        self._members, self._round_begin = list(members), time.monotonic()
        self._round_samples, self._round_size = 0, max(1, sum(len(m.train) for m in members))

    def count_samples(self, number: int) -> None:
        """Count the samples of a step, of all members."""
        self._round_samples += number
        if self._screen is not None:
            self._update(self._screen)

    def end_round(self) -> None:
        """Take the members' best values at the end of their epoch."""
        self.num_samples += self._round_samples
        self.seconds += time.monotonic() - self._round_begin
        for member in self._members:
            self._compare(member)

    def count_member(self, member: Member) -> None:
        """Count a member that has ended."""
        self.num_members += 1
        self._members = [m for m in self._members if m is not member]
        if member.error is not None:
            self.failed_jobs.add(member.number)
        elif member.epoch < member.max_epochs:
            self.num_early_stops += 1

    def count_job(self, number: int, error: BaseException | None) -> None:
        """Count a job that has ended; `error` is what it has raised."""
        self.num_ended += 1
        if error is not None:
            self.failed_jobs.add(number)

    def _compare(self, member: Member) -> None:
        progress, stopping = member.progress, member.stopping
        if progress.best_epoch is None:
            return
        # Values of different losses cannot be compared.
        is_loss = stopping.monitor.endswith("loss")
        key = stopping.monitor, member.loss_text if is_loss else ""
        leader = self._leaders.get(key)
        value = progress.best_value
        if leader is not None:
            is_better = value < leader.value if stopping.mode == "min" else value > leader.value
            if not is_better:
                return
        self._leaders[key] = Leader(stopping.monitor, value, member.number)

    # -- what is shown -------------------------------------------------------------------------

    @property
    def best_values(self) -> str:
        """The best value of each metric that members are judged by, as text; empty without any."""
        leaders = [str(leader) for leader in self._leaders.values()]
        text = ", ".join(leaders[:MAX_LEADERS]) + (", ..." if leaders[MAX_LEADERS:] else "")
        return f"best {text}" if text else ""

    @property
    def summary(self) -> str:
        """One line about all jobs: how many ended how, the best values, the speed."""
        rate = self.num_samples / self.seconds if self.seconds else 0.0
        parts = [
            f"{self.num_ended} of {self.num_jobs} jobs ended",
            f"{self.num_members} of them as members ({self.num_early_stops} stopped early)",
            f"{len(self.failed_jobs)} failed",
            self.best_values,
            f"{rate:,.0f} samples/s in {self.seconds:.1f} s of training",
        ]
        return ", ".join(part for part in parts if part)

    def _update(self, screen: Screen) -> None:
        now = time.monotonic()
        is_due = now - self._last_time > NOTEBOOK_SECONDS or not self.is_visible
        if not is_due or now - self._begin <= runtime.SHOW_AFTER_SECONDS:
            return
        self._last_time, self.is_visible = now, True
        share = min(1.0, self._round_samples / self._round_size)
        position = sum((m.epoch + share) / max(1, m.max_epochs) for m in self._members)
        screen.show(self.num_ended + position, self.num_jobs, self._text(now))

    def _text(self, now: float) -> str:
        num_running = len(self._members)
        counts = f"{num_running} running, {self.num_ended} ended"
        if self.num_early_stops or self.failed_jobs:
            counts += f" ({self.num_early_stops} early, {len(self.failed_jobs)} failed)"
        rate = self._round_samples / max(now - self._round_begin, 1e-3)
        parts = [
            counts,
            f"{self.num_jobs - self.num_ended - num_running} waiting",
            self.best_values,
            f"{rate:,.0f} samples/s",
        ]
        return ", ".join(part for part in parts if part)
