"""Rolling sums and extremes of every window of a set, each built from shorter ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from qtorch.data.expression.plan import Link, window_chain


@lru_cache(maxsize=256)
def _links(windows: tuple[int, ...], overlap: bool) -> tuple[tuple[Link, tuple[int, ...]], ...]:
    """The chain's links, each with the windows that are not needed after it."""
    chain = window_chain(windows, overlap=overlap)
    links, alive = [], {1}
    for at, link in enumerate(chain):
        alive.add(link.window)
        later = {w for rest in chain[at + 1 :] for w in (rest.newer, rest.older)}
        spent = tuple(w for w in alive if w not in later and w not in windows)
        alive -= set(spent)
        links.append((link, spent))
    return tuple(links)


def _build(
    base: Tensor, windows: tuple[int, ...], join: Callable[..., Tensor], *, overlap: bool
) -> dict[int, Tensor]:
    built = {1: base}
    for link, spent in _links(windows, overlap):
        newer, older, cut = built[link.newer], built[link.older], link.shift
        whole = torch.empty_like(base)
        join(newer[cut:], older[:-cut], out=whole[cut:])
        whole[:cut] = newer[:cut]
        built[link.window] = whole
        for window in spent:
            del built[window]
    return {w: built[w] for w in windows}


def rolling_sums(base: Tensor, windows: tuple[int, ...]) -> dict[int, Tensor]:
    """Sums `[D, n]` over each window, cut at the first row: `S10[i] = S5[i] + S5[i - 5]`.

    `base` holds no NaN; windows are ascending, from 1 to D rows. Adding up shifted slices keeps
    float64's accuracy, which a difference of cumulative sums loses.
    """
    return _build(base, windows, torch.add, overlap=False)


def rolling_extremes(base: Tensor, windows: tuple[int, ...], *, largest: bool) -> dict[int, Tensor]:
    """Maxima or minima over each window, cut at the first row; parts of a window may overlap."""
    return _build(base, windows, torch.maximum if largest else torch.minimum, overlap=True)
