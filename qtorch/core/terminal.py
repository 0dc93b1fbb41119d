"""The console on which commands print, and the log and the progress bars are shown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment

from qtorch.core.errors import printable_text


class Terminal(Console):
    """A console that shows text as it is.

    Names, overrides, paths and errors are the words of users, and sometimes of strangers: `[red]`
    in them is no markup, and control characters in them do not reach the terminal. A style is
    given with `rich.text.Text`. Every console of qtorch is one of these.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render an object, without the control characters of its texts."""
        for segment in super().render(renderable, options):
            is_own_control = segment.control is not None  # how rich moves the cursor
            yield segment if is_own_control else segment._replace(text=printable_text(segment.text))


def progress_bars(*columns: ProgressColumn, transient: bool = False) -> Progress:
    """Create progress bars on stderr, with description, bar, and `columns` or else rich's own."""
    description = TextColumn("{task.description}", markup=False)
    columns = columns or (TaskProgressColumn(), TimeRemainingColumn())
    return Progress(
        description, BarColumn(), *columns, console=Terminal(stderr=True), transient=transient
    )
