"""Checks for infinite values in loaded data: an error with their location unless replaced later."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import compress

import pandas as pd
import torch
from torch import Tensor

from qtorch.core.errors import DataError
from qtorch.data.panel.columns import column_parts
from qtorch.data.panel.view import View

log = logging.getLogger(__name__)

REPAIR_HINT = (
    "Fix the data, or put ProcessInf first in the handler's infer_processors: it replaces them by "
    "the mean of the day"
)

# Set by the handler that loads: processors replace infinities later (True) or not (False). None
# means that the data is loaded without a handler.
_allow_infinities: ContextVar[bool | None] = ContextVar("qtorch_allow_infinities", default=None)


@contextmanager
def infinity_policy(allow: bool) -> Iterator[None]:
    """Make raw infinities an error inside the block, unless processors replace them (`allow`)."""
    token = _allow_infinities.set(allow)
    try:
        yield
    finally:
        _allow_infinities.reset(token)


def is_infinity_allowed() -> bool:
    """Whether raw infinities are allowed here because processors replace them."""
    return bool(_allow_infinities.get())


def check_bars(
    values: Tensor, fields: Sequence[str], calendar: pd.DatetimeIndex, instruments: Sequence[str]
) -> None:
    """Check bars `[F, D, N]` for infinities after they were read.

    Raises DataError if a handler loads them and its processors do not replace them, because what
    a clip, a rank or a division makes of infinities looks like data. Without a handler, only a
    warning is logged.
    """
    if any(bool(field.isinf().any()) for field in values):
        _report_infinities(
            "bars", describe_infinities(values.isinf(), fields, calendar, instruments)
        )


def check_view(view: View) -> View:
    """Check the view of a user's own columns in the same way, and return it."""
    reports = []
    for group, columns in view.groups.items():
        for names in column_parts(columns.names):
            if columns.is_known_finite(names):
                continue
            infinite = columns.block(names).isinf()
            if bool(infinite.any()):
                full_names = [f"{group}/{name}" if group else name for name in names]
                reports.append(
                    describe_infinities(infinite, full_names, view.calendar, view.instruments)
                )
    if reports:
        _report_infinities("data", "; ".join(reports))
    return view


def describe_infinities(
    infinite: Tensor,
    names: Sequence[str],
    calendar: pd.DatetimeIndex,
    instruments: Sequence[str] | pd.Index,
) -> str:
    """List the columns of `infinite [K, D, N]` with infinities, their counts and the first one."""
    counts = infinite.sum((1, 2)).tolist()
    counts_text = ", ".join(
        f"{n} ({count})" for n, count in zip(names, counts, strict=True) if count
    )
    date, instrument = torch.nonzero(infinite.any(0))[0].tolist()
    return f"{counts_text}, first {instruments[instrument]} on {calendar[date]:%Y-%m-%d}"


def check_processed_columns(
    names: Iterable[str], infinite: Iterable[bool], source: str, *, limit: float | None = None
) -> None:
    """Raise DataError if processed columns are `infinite`, i.e. hold an infinity.

    With a `limit`, numbers beyond it have become infinite when they were stored.
    """
    bad = list(compress(names, infinite))
    if bad:
        examples = ", ".join(bad[:8]) + (f", ... ({len(bad)} in all)" if len(bad) > 8 else "")
        if limit is not None:
            raise DataError(
                f"values beyond {limit:g}, or infinite, in the {source}: {examples}. Normalise "
                "them, or set feature_dtype=bfloat16, which has the range of float32."
            )
        raise DataError(
            f"infinite values in the {source}: {examples}. Put ProcessInf before the other "
            "processors, or fix the expression (is it a division by zero?)."
        )


def _report_infinities(source: str, location: str) -> None:
    message = f"infinite values in the {source}: {location}"
    if _allow_infinities.get() is False:
        raise DataError(f"{message}. {REPAIR_HINT}.")
    log.warning(
        "%s. %s.",
        message,
        "ProcessInf replaces them" if _allow_infinities.get() else REPAIR_HINT,
    )
