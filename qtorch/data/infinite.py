"""Infinite values in what is loaded: an error that says where they are, unless they are mended."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import pandas as pd
import torch
from torch import Tensor

from qtorch.core.errors import DataError
from qtorch.data.view import View

log = logging.getLogger(__name__)

COLUMNS_AT_ONCE = 16
MEND = (
    "Mend them in the data, or put ProcessInf first among the handler's infer_processors: it puts "
    "the mean of the day in their place"
)

# What who loads has said of infinities: mended later (True), not (False), or nothing (None).
_mended: ContextVar[bool | None] = ContextVar("qtorch_infinite_mended", default=None)


@contextmanager
def infinities_are_mended(mended: bool) -> Iterator[None]:
    """Inside the block raw infinities are an error, unless processors are known to mend them."""
    token = _mended.set(mended)
    try:
        yield
    finally:
        _mended.reset(token)


def infinities_pass() -> bool:
    """Whether raw infinities are let through here, as processors mend them."""
    return bool(_mended.get())


def check_bars(
    values: Tensor, fields: Sequence[str], calendar: pd.DatetimeIndex, instruments: Sequence[str]
) -> None:
    """Look for infinities in bars `[F, D, N]` as they were read.

    Raises DataError where a handler loads whose processors do not mend them: what a clip, a rank
    or a division makes of them looks like data. For who looks at bars alone it is a warning.
    """
    if any(bool(field.isinf().any()) for field in values):
        _judge("bars", where_infinite(values.isinf(), fields, calendar, instruments))


def checked(view: View) -> View:
    """The view of a user's own columns, looked at in the same way."""
    found = []
    for group, columns in view.groups.items():
        for first in range(0, len(columns.names), COLUMNS_AT_ONCE):
            names = columns.names[first : first + COLUMNS_AT_ONCE]
            if columns.is_surely_finite(names):
                continue
            infinite = columns.block(names).isinf()
            if bool(infinite.any()):
                said = [f"{group}/{name}" if group else name for name in names]
                found.append(where_infinite(infinite, said, view.calendar, view.instruments))
    if found:
        _judge("data", "; ".join(found))
    return view


def where_infinite(
    infinite: Tensor,
    names: Sequence[str],
    calendar: pd.DatetimeIndex,
    instruments: Sequence[str] | pd.Index,
) -> str:
    """The columns of `infinite [K, D, N]` that have some, how many, and where the first one is."""
    counts = infinite.sum((1, 2)).tolist()
    held = ", ".join(f"{n} ({count})" for n, count in zip(names, counts, strict=True) if count)
    date, instrument = torch.nonzero(infinite.any(0))[0].tolist()
    return f"{held}, first {instruments[instrument]} on {calendar[date]:%Y-%m-%d}"


def _judge(what: str, where: str) -> None:
    said = f"infinite values in the {what}: {where}"
    if _mended.get() is False:
        raise DataError(f"{said}. {MEND}.")
    log.warning("%s. %s.", said, "ProcessInf mends what is made of them" if _mended.get() else MEND)
