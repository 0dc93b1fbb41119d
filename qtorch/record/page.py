"""One HTML page that needs nothing else: headings, numbers, tables, pictures in two widths."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtorch.core.files import whole_file
from qtorch.record.page_style import STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_VECTOR_BYTES = 90_000  # a picture of more than this as SVG is a PNG in the page
PNG_DPI, PAGE_DPI = 150, 144
PHONE = "screen and (max-width: 600px)"

_PERCENT = ("return", "drawdown", "turnover", "cost", "weight", "share", "spread", "volatility")
_PROBABILITY = ("probabilistic_sharpe", "deflated_sharpe", "p_value")
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
    elif any(part in name for part in _PERCENT) and "ratio" not in name:
        text = f"{value:.2%}" if abs(value) >= 0.001 or value == 0 else f"{value:.4%}"
    elif name.endswith(_COUNT):
        text = f"{value:,.1f}".removesuffix(".0")
    elif abs(value) >= 1000 or (value and abs(value) < 1e-4):
        text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2e}"
    else:
        text = f"{value:.4f}" if abs(value) < 1 else f"{value:.3f}"
    return text.replace("-", "−")


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
        return (
            f'<{tag} class="number" data-metric="{escape(self.metric)}" '
            f'data-value="{float(self.value)!r}"{of}>{shown(self.value, self.metric)}</{tag}>'
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
    inner = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in pairs)
    return f'<dl class="facts">{inner}</dl>'


def folded(summary: str, inner: str) -> str:
    """Something that a reader opens on demand."""
    return f"<details><summary>{escape(summary)}</summary>{inner}</details>"


def _cell(cell: Cell, first: bool) -> str:
    if isinstance(cell, Number):
        return cell.html("td")
    text = cell if isinstance(cell, Markup) else escape(cell)
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
        self.pictures: list[Path] = []
        self._parts: list[str] = []

    def add(self, *parts: str) -> None:
        """Elements that belong to no section."""
        self._parts += [p for p in parts if p]

    def section(self, title: str, *parts: str) -> None:
        """A heading and what stands under it."""
        inner = "\n".join(p for p in parts if p)
        self._parts.append(f"<section>\n<h2>{escape(title)}</h2>\n{inner}\n</section>")

    def picture(
        self, name: str, draw: Callable[..., Figure], *args: Any, says: str, **options: Any
    ) -> str:
        """The figure of `draw(*args, narrow=..., **options)`, kept as `name.png` too.

        `says` is what it shows, for who cannot see it.
        """
        wide = draw(*args, narrow=False, **options)
        path = self.folder / f"{name}.png"
        with whole_file(path) as temporary:
            wide.savefig(temporary, dpi=PNG_DPI, format="png")
        self.pictures.append(path)
        narrow = draw(*args, narrow=True, **options)
        width, height = (round(96 * inches) for inches in wide.get_size_inches())
        return (
            f'<figure id="{escape(name)}"><picture>'
            f'<source media="{PHONE}" srcset="{image_uri(narrow)}">'
            f'<img src="{image_uri(wide)}" alt="{escape(says)}" width="{width}" '
            f'height="{height}"></picture></figure>'
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


def image_uri(figure: Figure) -> str:
    """A figure as a data URI: SVG, sharp at every size, or PNG where that is much smaller."""
    import matplotlib

    out = io.BytesIO()
    # Letters as outlines look the same everywhere; a fixed salt makes equal figures equal files.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "qtorch"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    kind = "svg+xml"
    if out.tell() > MOST_VECTOR_BYTES:
        out, kind = io.BytesIO(), "png"
        figure.savefig(out, format="png", dpi=PAGE_DPI)
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"
