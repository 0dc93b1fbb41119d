"""Builds a self-contained HTML page of headings, numbers, tables and charts in two widths."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtorch.core.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure


STYLE = """
:root { color-scheme: light; --ink: #1f2933; --soft: #5f6b78; --line: #d9dee4; --wash: #f5f7f9; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
main { max-width: 912px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 48px 0 12px; padding-top: 12px;
  border-top: 2px solid var(--ink); }
h3 { font-size: 1rem; margin: 28px 0 4px; }
p { margin: 0 0 12px; max-width: 72ch; }
.note { color: var(--soft); font-size: 0.875rem; }
.missing { background: var(--wash); border-left: 3px solid #e07a1f; padding: 8px 12px;
  font-size: 0.9375rem; overflow-wrap: anywhere; }
figure { margin: 12px 0 16px; }
figure img { display: block; width: 100%; height: auto; }
dl { margin: 0; }
dt { color: var(--soft); font-size: 0.8125rem; line-height: 1.3; }
dd { margin: 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr));
  gap: 10px 24px; margin: 12px 0 24px; font-size: 0.9375rem; }
.facts dd { overflow-wrap: anywhere; }
.date { white-space: nowrap; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr));
  gap: 1px; padding: 1px; }
.cards > div { box-shadow: 0 0 0 1px var(--line); padding: 10px 12px;
  display: flex; flex-direction: column; justify-content: space-between; }
.cards dd { font-size: 1.375rem; font-weight: 600; line-height: 1.3; white-space: nowrap; }
.number { font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; margin: 8px 0 16px; }
table { border-collapse: collapse; font-size: 0.875rem; min-width: 50%; }
caption { text-align: left; color: var(--soft); padding-bottom: 4px; }
th, td { padding: 5px 16px 5px 0; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; border-bottom: 1px solid var(--ink);
  vertical-align: bottom; white-space: normal; }
th:first-child { text-align: left; }
tbody th { font-weight: 400; white-space: normal; overflow-wrap: anywhere; min-width: 6.5rem; }
tbody tr:hover { background: var(--wash); }
.wrap th, .wrap td { white-space: normal; overflow-wrap: anywhere; text-align: left;
  vertical-align: top; }
.columns { columns: 2; column-gap: 40px; }
.columns .scroll { margin-top: 0; break-inside: avoid; }
.columns table { width: 100%; }
details { margin: 8px 0 16px; }
summary { cursor: pointer; color: var(--soft); font-size: 0.9375rem; }
a { color: #2364aa; }
@media screen and (max-width: 600px) {
  main { padding: 20px 14px 48px; }
  h1 { font-size: 1.375rem; }
  h2 { font-size: 1.125rem; margin-top: 36px; }
  .cards { grid-template-columns: repeat(2, 1fr); }
  .cards dd { font-size: 1.1875rem; }
  .facts { grid-template-columns: 1fr 1fr; gap: 8px 16px; }
  .columns { columns: 1; }
  table { min-width: 100%; }
}
@page { size: A4; margin: 14mm 13mm; }
@media print {
  body { font-size: 10.5pt; color: #000; }
  main { max-width: none; padding: 0; }
  h2, h3 { break-after: avoid; }
  h2 { margin-top: 22pt; }
  figure, .cards, tr, p, .together { break-inside: avoid; }
  details { display: none; }
  thead { display: table-header-group; }
  .scroll { overflow: visible; }
  table { font-size: 8.5pt; }
  th, td { padding: 3pt 10pt 3pt 0; }
  .cards { grid-template-columns: repeat(6, 1fr); }
  .cards dd { font-size: 14pt; }
  a { color: inherit; text-decoration: none; }
}
"""

DPI = 192  # twice the page's 96, for high-resolution screens and for print
PHONE = "screen and (max-width: 600px)"

_PERCENT = ("return", "drawdown", "turnover", "cost", "weight", "share", "spread", "volatility")
_PROBABILITY = ("probabilistic_sharpe", "deflated_sharpe")
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_BREAK_POINT = re.compile(r"(?<=\w)([._/])(?=\w)")  # where a long name may be wrapped
_STATISTICS = ("mean", "std")  # statistics of the quantity named by the word before
_COUNTS = ("positions", "days", "tries", "epoch", "count")


def format_number(value: float, metric: str = "") -> str:
    """Format a number according to its metric's name, for example returns in percent."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    words = metric.lower().replace(" ", "_").split(".")
    name = next((w for w in reversed(words) if not (w.isdigit() or w in _STATISTICS)), "")
    if name.endswith(_PROBABILITY):
        text = f"{value:.1%}"
    elif name.endswith("p_value"):
        text = f"{value:.4f}" if value >= 0.0001 else "< 0.0001"
    elif any(part in name for part in _PERCENT) and "ratio" not in name:
        text = f"{value:.2%}" if abs(value) >= 0.01 or value == 0 else f"{value:.3%}"
    elif name.endswith(_COUNTS):
        text = f"{value:,.1f}".removesuffix(".0")
    else:
        text = _format_plain(value)
    return text.replace("-", "−")


def _format_plain(value: float) -> str:
    """Format a number with four decimals below 1, six if it is small, none from 1000."""
    size = abs(value)
    if 0 < size < 1e-6:
        return f"{value:.2e}"
    decimals = 0 if size >= 1000 else 3 if size >= 1 else 4 if size >= 1e-4 or not size else 6
    return f"{value:,.{decimals}f}"


@dataclass(frozen=True)
class Number:
    """A metric's value; the page contains it in full precision besides the short form.

    `group` names the run or group that it belongs to on a page with several of them.
    """

    metric: str
    value: float
    group: str = ""

    def html(self, tag: str = "span") -> str:
        """Return the HTML element with `data-metric`, `data-value` and `data-of` (the group)."""
        group_attribute = f' data-of="{escape(self.group)}"' if self.group else ""
        short = escape(format_number(self.value, self.metric))
        return (
            f'<{tag} class="number" data-metric="{escape(self.metric)}" '
            f'data-value="{float(self.value)!r}"{group_attribute}>{short}</{tag}>'
        )


class Markup(str):
    """A text that is already HTML and must not be escaped."""


Cell = Number | Markup | str


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph of plain text; `kind` is a CSS class of the page: note, missing."""
    return f"<p{_class_attribute(kind)}>{escape(text)}</p>"


def table(
    head: Sequence[str], rows: Iterable[Sequence[Cell]], caption: str = "", kind: str = ""
) -> str:
    """Return a table that scrolls horizontally if the page is too narrow for it."""
    caption_html = f"<caption>{escape(caption)}</caption>" if caption else ""
    headings = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f"<tr>{''.join(_cell(c, k == 0) for k, c in enumerate(row))}</tr>" for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table{_class_attribute(kind)}>{caption_html}'
        f"<thead><tr>{headings}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def cards(numbers: Sequence[tuple[str, Number]]) -> str:
    """Return the key numbers as a row of cards, each below its name."""
    inner = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{number.html()}</dd></div>" for name, number in numbers
    )
    return f'<dl class="cards">{inner}</dl>' if inner else ""


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Return a list of names and descriptions that says what the page is about."""
    inner = "".join(
        f"<div><dt>{escape(k)}</dt><dd>{_DATE.sub(_keep_date_together, escape(v))}</dd></div>"
        for k, v in pairs
    )
    return f'<dl class="facts">{inner}</dl>'


def collapsible(summary: str, content: str) -> str:
    """Return a block that the reader can expand."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _keep_date_together(match: re.Match[str]) -> str:
    """Wrap a date so that no line break divides it."""
    return f'<span class="date">{match[0]}</span>'


def _cell(cell: Cell, first: bool) -> str:
    if isinstance(cell, Number):
        return cell.html("td")
    text = cell if isinstance(cell, Markup) else _BREAK_POINT.sub(r"\1<wbr>", escape(cell))
    return f'<th scope="row">{text}</th>' if first else f"<td>{text}</td>"


def _class_attribute(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


class Page:
    """Collects sections, draws their charts, and writes the page and PNG files into a folder.

    Each chart is drawn twice, wide and narrow; the page contains both and the browser selects one.
    """

    def __init__(self, folder: Path, title: str) -> None:
        self.folder = folder
        self.title = title
        self._parts: list[str] = []

    def add(self, *parts: str) -> None:
        """Add elements outside of any section."""
        self._parts += [p for p in parts if p]

    def section(self, title: str, *parts: str) -> None:
        """Add a section; in print, its heading stays on one page with the first chart."""
        elements = [p for p in parts if p]
        split = next((k + 1 for k, p in enumerate(elements) if p.startswith("<figure")), 1)
        top = "\n".join([f"<h2>{escape(title)}</h2>", *elements[:split]])
        bottom = "\n".join(elements[split:])
        self._parts.append(f'<section>\n<div class="together">{top}</div>\n{bottom}\n</section>')

    def picture(
        self, name: str, draw: Callable[..., Figure], *args: Any, alt_text: str, **options: Any
    ) -> str:
        """Return the chart that `draw(*args, narrow=..., **options)` draws; also save it as PNG.

        `alt_text` describes it for readers who cannot see it.
        """
        wide, narrow = (_png(draw(*args, narrow=n, **options)) for n in (False, True))
        path = self.folder / f"{name}.png"
        with atomic_write(path) as temporary:
            temporary.write_bytes(wide.data)
        return (
            f'<figure id="{escape(name)}"><picture>'
            f'<source media="{PHONE}" srcset="{narrow.uri}" {narrow.size}>'
            f'<img src="{wide.uri}" alt="{escape(alt_text)}" {wide.size}></picture></figure>'
        )

    def write(self, name: str) -> Path:
        """Write the page under `name` and return its path."""
        path = self.folder / name
        body = "\n".join(self._parts)
        with atomic_write(path) as temporary:
            temporary.write_text(
                '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
                '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
                f"<title>{escape(self.title)}</title>\n<style>{STYLE}</style>\n</head>\n"
                f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n",
                encoding="utf-8",
            )
        return path


@dataclass(frozen=True)
class _Png:
    data: bytes
    size: str  # the width and height attributes of the HTML element

    @property
    def uri(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.data).decode()}"


def _png(figure: Figure) -> _Png:
    """Render a figure in 256 colours: enough for lines and text, at a third of the size."""
    from PIL import Image

    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, dpi=DPI, format="png")
    with Image.open(full) as image:
        # MAXCOVERAGE also preserves rare colours.
        palette_image = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
        palette_image.save(small, format="png", optimize=True)
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return _Png(small.getvalue(), f'width="{width}" height="{height}"')
