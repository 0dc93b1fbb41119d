"""One HTML page that needs nothing else: headings, numbers, tables, pictures in two widths."""

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

from qtorch.core.files import whole_file
from qtorch.record.page_style import STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS = 192  # an inch: two for each of the page's, for sharp screens and for paper
PHONE = "screen and (max-width: 600px)"

_PERCENT = ("return", "drawdown", "turnover", "cost", "weight", "share", "spread", "volatility")
_PROBABILITY = ("probabilistic_sharpe", "deflated_sharpe")
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_BREAK = re.compile(r"(?<=\w)([._/])(?=\w)")  # where a long name may go on in the next line
_OF = ("mean", "std")  # of what the word before says
_COUNT = ("positions", "days", "tries", "epoch", "count")


def shown(value: float, metric: str = "") -> str:
    """A number as a reader wants it, by the metric's name: returns in per cent, and so on."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    words = metric.lower().replace(" ", "_").split(".")
    name = next((w for w in reversed(words) if not (w.isdigit() or w in _OF)), "")
    if name.endswith(_PROBABILITY):
        text = f"{value:.1%}"
    elif name.endswith("p_value"):
        text = f"{value:.4f}" if value >= 0.0001 else "< 0.0001"
    elif any(part in name for part in _PERCENT) and "ratio" not in name:
        text = f"{value:.2%}" if abs(value) >= 0.01 or value == 0 else f"{value:.3%}"
    elif name.endswith(_COUNT):
        text = f"{value:,.1f}".removesuffix(".0")
    else:
        text = _plain(value)
    return text.replace("-", "−")


def _plain(value: float) -> str:
    """Four decimals under 1, six where it is small, none from 1000."""
    size = abs(value)
    if 0 < size < 1e-6:
        return f"{value:.2e}"
    decimals = 0 if size >= 1000 else 3 if size >= 1 else 4 if size >= 1e-4 or not size else 6
    return f"{value:,.{decimals}f}"


@dataclass(frozen=True)
class Number:
    """A metric's value; the page carries it in full beside the short form.

    `of` tells whose it is where a page has several runs or groups.
    """

    metric: str
    value: float
    of: str = ""

    def html(self, tag: str = "span") -> str:
        """The element, with `data-metric` and `data-value` (and `data-of`)."""
        of = f' data-of="{escape(self.of)}"' if self.of else ""
        short = escape(shown(self.value, self.metric))
        return (
            f'<{tag} class="number" data-metric="{escape(self.metric)}" '
            f'data-value="{float(self.value)!r}"{of}>{short}</{tag}>'
        )


class Markup(str):
    """A text that is HTML already."""


Cell = Number | Markup | str


def paragraph(text: str, kind: str = "") -> str:
    """Plain text as a paragraph; `kind` is a class of the page's style: note, missing."""
    return f"<p{_class(kind)}>{escape(text)}</p>"


def table(
    head: Sequence[str], rows: Iterable[Sequence[Cell]], caption: str = "", kind: str = ""
) -> str:
    """A table that scrolls by itself where the page is too narrow for it."""
    told = f"<caption>{escape(caption)}</caption>" if caption else ""
    tops = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f"<tr>{''.join(_cell(c, k == 0) for k, c in enumerate(row))}</tr>" for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table{_class(kind)}>{told}'
        f"<thead><tr>{tops}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def cards(numbers: Sequence[tuple[str, Number]]) -> str:
    """The key numbers in a row, each under its name."""
    inner = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{number.html()}</dd></div>" for name, number in numbers
    )
    return f'<dl class="cards">{inner}</dl>' if inner else ""


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """What a page is about: names and words."""
    inner = "".join(
        f"<div><dt>{escape(k)}</dt><dd>{_DATE.sub(_whole, escape(v))}</dd></div>" for k, v in pairs
    )
    return f'<dl class="facts">{inner}</dl>'


def folded(summary: str, inner: str) -> str:
    """Something that a reader opens on demand."""
    return f"<details><summary>{escape(summary)}</summary>{inner}</details>"


def _whole(found: re.Match[str]) -> str:
    """A date that no line break divides."""
    return f'<span class="date">{found[0]}</span>'


def _cell(cell: Cell, first: bool) -> str:
    if isinstance(cell, Number):
        return cell.html("td")
    text = cell if isinstance(cell, Markup) else _BREAK.sub(r"\1<wbr>", escape(cell))
    return f'<th scope="row">{text}</th>' if first else f"<td>{text}</td>"


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


class Page:
    """Collects sections, draws their pictures, writes the page and the PNGs into a folder.

    A picture is drawn twice, wide and narrow; the page holds both and the reader's screen chooses.
    """

    def __init__(self, folder: Path, title: str) -> None:
        self.folder = folder
        self.title = title
        self._parts: list[str] = []

    def add(self, *parts: str) -> None:
        """Elements that belong to no section."""
        self._parts += [p for p in parts if p]

    def section(self, title: str, *parts: str) -> None:
        """A heading and what stands under it; on paper it keeps with its first picture."""
        held = [p for p in parts if p]
        first = next((k + 1 for k, p in enumerate(held) if p.startswith("<figure")), 1)
        together = "\n".join([f"<h2>{escape(title)}</h2>", *held[:first]])
        rest = "\n".join(held[first:])
        self._parts.append(f'<section>\n<div class="together">{together}</div>\n{rest}\n</section>')

    def picture(
        self, name: str, draw: Callable[..., Figure], *args: Any, says: str, **options: Any
    ) -> str:
        """The figure of `draw(*args, narrow=..., **options)`, kept as `name.png` too.

        `says` is what it shows, for who cannot see it.
        """
        wide, narrow = (_png(draw(*args, narrow=n, **options)) for n in (False, True))
        path = self.folder / f"{name}.png"
        with whole_file(path) as temporary:
            temporary.write_bytes(wide.data)
        return (
            f'<figure id="{escape(name)}"><picture>'
            f'<source media="{PHONE}" srcset="{narrow.uri}" {narrow.size}>'
            f'<img src="{wide.uri}" alt="{escape(says)}" {wide.size}></picture></figure>'
        )

    def write(self, name: str) -> Path:
        """Write the page under `name` and return its path."""
        path = self.folder / name
        body = "\n".join(self._parts)
        with whole_file(path) as temporary:
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
    size: str  # the element's attributes

    @property
    def uri(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.data).decode()}"


def _png(figure: Figure) -> _Png:
    """A figure in 256 colours: enough for lines and letters, at a third of the size."""
    from PIL import Image

    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, dpi=DOTS, format="png")
    with Image.open(full) as image:
        few = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)  # rare ones stay too
        few.save(small, format="png", optimize=True)
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return _Png(small.getvalue(), f'width="{width}" height="{height}"')
