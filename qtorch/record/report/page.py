"""Renders self-contained HTML pages from the Jinja2 templates of this package, with charts."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from qtorch.core.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CSS_DPI = 96
DPI = 2 * CSS_DPI  # for high-resolution screens and for print

_PERCENT = ("return", "drawdown", "turnover", "cost", "weight", "share", "spread", "volatility")
_PROBABILITY = ("probabilistic_sharpe", "deflated_sharpe", "probability")
_STATISTICS = ("mean", "std")  # statistics of the quantity named by the word before
_COUNTS = ("positions", "days", "tries", "epoch", "count")


class Page:
    """A page in a folder, with its charts also as PNG files.

    Each chart is drawn twice, wide and narrow; the page contains both and the browser selects one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pictures: dict[str, Picture] = {}

    def draw(self, name: str, chart: Callable[..., Figure], *args: Any, **options: Any) -> None:
        """Draw `chart(*args, narrow=..., **options)` and save its wide form as PNG file."""
        wide, narrow = (_png(chart(*args, narrow=n, **options)) for n in (False, True))
        with atomic_write(self.folder / f"{name}.png") as temporary:
            temporary.write_bytes(wide.data)
        self.pictures[name] = Picture(name, wide, narrow)

    def write(self, name: str, template: str, **values: Any) -> Path:
        """Write the page under `name` and return its path.

        The template gets the values, and the charts drawn so far as `pictures`.
        """
        path = self.folder / name
        html = _environment().get_template(template).render(pictures=self.pictures, **values)
        with atomic_write(path) as temporary:
            temporary.write_text(html, encoding="utf-8")
        return path


@dataclass(frozen=True)
class Picture:
    """A chart for a column of the page and for the screen of a phone."""

    name: str
    wide: Png
    narrow: Png


@dataclass(frozen=True)
class Png:
    """An image; `width` and `height` are those on the page, in CSS pixels."""

    data: bytes
    width: int
    height: int

    @property
    def uri(self) -> str:
        """The image as a `data:` URI."""
        return f"data:image/png;base64,{base64.b64encode(self.data).decode()}"


def _png(figure: Figure) -> Png:
    """Render a figure in 256 colours: enough for lines and text, at a third of the size."""
    from PIL import Image

    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, dpi=DPI, format="png")
    with Image.open(full) as image:
        # MAXCOVERAGE also preserves rare colours.
        palette_image = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
        palette_image.save(small, format="png", optimize=True)
    width, height = (round(CSS_DPI * inches) for inches in figure.get_size_inches())
    return Png(small.getvalue(), width, height)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("qtorch.record.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (format_number, breakable, keep_dates_together)
    environment.filters |= {function.__name__: function for function in filters}
    return environment


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


def breakable(text: str) -> Markup:
    """Escape a long name and allow line breaks at its dots, slashes and underscores."""
    return Markup(re.sub(r"(?<=\w)([._/])(?=\w)", r"\1<wbr>", str(escape(text))))


def keep_dates_together(text: str) -> Markup:
    """Escape a text and allow no line breaks within its dates."""
    return Markup(re.sub(r"\d{4}-\d\d-\d\d", r'<span class="date">\g<0></span>', str(escape(text))))
