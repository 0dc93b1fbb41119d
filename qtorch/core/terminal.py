"""The console on which commands print, log and progress bars, and summaries for notebooks."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
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


# -- notebooks -------------------------------------------------------------------------------------

CURVE_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728")
CURVE_WIDTH, CURVE_HEIGHT = 420, 130


def html_summary(title: str, facts: Mapping[str, Any], *parts: str) -> str:
    """Return a title and facts by name as HTML, followed by `parts`, which are HTML already."""
    rows = "".join(
        f"<tr><th style='text-align:left'>{_escape(name)}</th>"
        f"<td style='text-align:left'>{_escape(value)}</td></tr>"
        for name, value in facts.items()
    )
    return f"<div><b>{_escape(title)}</b><table>{rows}</table>{''.join(parts)}</div>"


def html_link(address: str, command: str | None = None) -> str:
    """Return a link as HTML, and the command that must run first so that it opens."""
    link = f"<a href='{_escape(address)}'>{_escape(address)}</a>"
    return link if command is None else f"{link}, while <code>{_escape(command)}</code> runs"


def html_curves(curves: Mapping[str, Sequence[float]]) -> str:
    """Draw curves by name over a common axis as SVG; NaN and single points leave gaps."""
    values = [v for curve in curves.values() for v in curve if math.isfinite(v)]
    if not values:
        return ""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    num_points = max(len(curve) for curve in curves.values())
    step = CURVE_WIDTH / max(num_points - 1, 1)
    lines, names = [], []
    for (name, curve), colour in zip(curves.items(), CURVE_COLOURS * len(curves), strict=False):
        points = " ".join(
            f"{5 + k * step:.1f},{5 + (high - v) / span * CURVE_HEIGHT:.1f}"
            for k, v in enumerate(curve)
            if math.isfinite(v)
        )
        style = f"fill='none' stroke='{colour}' stroke-width='1.8'"
        lines.append(f"<polyline points='{points}' {style}/>")
        names.append(f"<span style='color:{colour}'>{_escape(name)}</span>")
    size = f"width='{CURVE_WIDTH + 10}' height='{CURVE_HEIGHT + 10}'"
    return (
        f"<div>{' '.join(names)} <small>{low:.4g} to {high:.4g}</small></div>"
        f"<svg xmlns='http://www.w3.org/2000/svg' {size}>{''.join(lines)}</svg>"
    )


def _escape(value: Any) -> str:
    return html.escape(printable_text(str(value)))
