"""Print tables and numbers on the terminal, in the same style for all commands."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from rich import box
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from qtorch.core.terminal import Terminal

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions

# The statuses of runs, of a search's trials and of a pool's tasks.
STATUS_STYLES = {
    "FINISHED": "green", "FAILED": "red", "KILLED": "yellow", "RUNNING": "cyan",
    "COMPLETE": "green", "FAIL": "red", "PRUNED": "yellow",
    "done": "green", "failed": "red", "running": "cyan",
}  # fmt: skip
PIPE_WIDTH = 160


def terminal() -> Terminal:
    """Create a console; pipes and files get wide lines, because they are searched, not viewed."""
    return Terminal() if sys.stdout.isatty() else Terminal(width=PIPE_WIDTH)


def new_table(
    *columns: str,
    title: str | None = None,
    numbers: Collection[str] = (),
    no_wrap: Collection[str] = (),
) -> Table:
    """Create a table; the columns in `numbers` are aligned to the right and not wrapped either."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for name in columns:
        if name in numbers:
            table.add_column(name, justify="right", no_wrap=True)
        else:
            table.add_column(name, overflow="fold", no_wrap=name in no_wrap)
    return table


class OverridesCell:
    """A table cell with overrides: lines end between two of them, or after a comma, "=" or a dot.

    Rich breaks a word that is longer than its column at any character.
    """

    def __init__(self, overrides: str) -> None:
        self.words = overrides.split()

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(max(map(len, self.words), default=0), len(" ".join(self.words)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        width = options.max_width
        lines = [""]
        for word in self.words:
            separator = " " if lines[-1] else ""
            for part in _break_word(word, width):
                if len(lines[-1] + separator + part) <= width:
                    lines[-1] += separator + part
                else:
                    lines.append(part)
                separator = ""
        yield Text("\n".join(lines), overflow="fold")


def _break_word(word: str, width: int) -> list[str]:
    """Break a word that is too long after commas and "=", and a part that still is after dots."""
    parts = [word]
    for separators in (",=", "."):
        pattern = f"[^{separators}]*[{separators}]|[^{separators}]+"
        parts = [
            p
            for part in parts
            for p in ([part] if len(part) <= width else re.findall(pattern, part))
        ]
    return parts


def print_table(table: Table) -> None:
    """Print a table; in a pipe or a file it is so wide that no word has to be cut."""
    console = terminal()
    if not sys.stdout.isatty():
        console.width = max(console.width, _width_of_words(table, console))
    console.print(table)


def _width_of_words(table: Table, console: Console) -> int:
    """Return the width at which the longest words of the table fit."""
    options = console.options.update(width=10_000)
    width = console.measure(table, options=options).minimum
    for column in (c for c in table.columns if c.no_wrap):  # these need the width of their texts
        texts = (column.header, *column.cells)
        measurements = [Measurement.get(console, options, text) for text in texts]
        width += max(m.maximum for m in measurements) - max(m.minimum for m in measurements)
    return width


def format_number(value: Any, digits: int = 4) -> str:
    """Format a number with fixed digits; a dash for None."""
    return "-" if value is None else f"{float(value):.{digits}f}"


def format_status(status: str, note: str | None = None) -> Text:
    """Colour a status by how well the work goes; a note follows in parentheses."""
    return Text.assemble(
        (status, STATUS_STYLES.get(status, "")), f" ({note})" if note else "", overflow="fold"
    )


def with_label(label: str, text: str) -> Text:
    """Return a line that begins with a label."""
    return Text.assemble((label, "dim"), " ", text)
