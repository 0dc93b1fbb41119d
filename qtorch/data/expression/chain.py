"""Rolling sums and extremes of several windows, each computed from shorter windows."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from qtorch.data.expression.plan import Link, window_chain


@lru_cache(maxsize=256)
def _chain_links(
    windows: tuple[int, ...], overlap: bool
) -> tuple[tuple[Link, tuple[int, ...]], ...]:
    """Return the links of the chain, each with the windows that are unused afterwards."""
    chain = window_chain(windows, overlap=overlap)
    links, live_windows = [], {1}
    for index, link in enumerate(chain):
        live_windows.add(link.window)
        later = {
            w for later_link in chain[index + 1 :] for w in (later_link.newer, later_link.older)
        }
        unused_windows = tuple(w for w in live_windows if w not in later and w not in windows)
        live_windows -= set(unused_windows)
        links.append((link, unused_windows))
    return tuple(links)


def _build_windows(
    base: Tensor, windows: tuple[int, ...], join: Callable[..., Tensor], *, overlap: bool
) -> dict[int, Tensor]:
    results = {1: base}
    for link, unused_windows in _chain_links(windows, overlap):
        newer, older, shift = results[link.newer], results[link.older], link.shift
        result = torch.empty_like(base)
        join(newer[shift:], older[:-shift], out=result[shift:])
        result[:shift] = newer[:shift]
        results[link.window] = result
        for window in unused_windows:
            del results[window]
    return {w: results[w] for w in windows}


def rolling_sums(base: Tensor, windows: tuple[int, ...]) -> dict[int, Tensor]:
    """Compute rolling sums `[D, n]` by window, such as `S10[i] = S5[i] + S5[i - 5]`.

    Windows are clipped at the first row. `base` must not have NaN; `windows` are ascending, from
    1 to D rows. Adding shifted sums keeps the accuracy of float64, which differences of
    cumulative sums lose.
    """
    return _build_windows(base, windows, torch.add, overlap=False)


def rolling_extremes(base: Tensor, windows: tuple[int, ...], *, largest: bool) -> dict[int, Tensor]:
    """Compute rolling maxima or minima `[D, n]` by window, clipped at the first row.

    The two parts that a window is computed from may overlap.
    """
    return _build_windows(base, windows, torch.maximum if largest else torch.minimum, overlap=True)
