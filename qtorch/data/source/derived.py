"""A source with further fields that are computed from those of another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch

from qtorch.core.errors import ConfigError
from qtorch.core.identity import digest
from qtorch.data.expression.evaluation import evaluate
from qtorch.data.expression.requirement import expression_fields, max_reach
from qtorch.data.panel.panel import Panel, clip_spans
from qtorch.data.source.base import Bars, Membership, Source


class DerivedSource(Source):
    """The fields of a source, and others computed from the same bar of the same instrument.

    `derived` maps each further field to its expression, such as `($high+$low+$close)/3`, or to None
    for a field that is NaN everywhere. Raises ConfigError for an expression that reads other bars.
    """

    def __init__(self, source: Source, derived: Mapping[str, str | None]) -> None:
        self.source, self.freq = source, source.freq
        self.derived = dict(derived)
        expressions = [e for e in self.derived.values() if e is not None]
        if max_reach(expressions) != (0, 0):
            raise ConfigError(f"{expressions} must read no other bars; remove Ref, Mean and so on.")

    @property
    def knows_names(self) -> bool:
        return self.source.knows_names

    def read_calendar(self, freq: str) -> pd.DatetimeIndex:
        return self.source.read_calendar(freq)

    def read_membership(self, universe: str) -> Membership:
        return self.source.read_membership(universe)

    def universes(self) -> tuple[str, ...]:
        return self.source.universes()

    def instrument_names(self) -> frozenset[str]:
        return self.source.instrument_names()

    def frequencies(self) -> tuple[str, ...]:
        return self.source.frequencies()

    def fields(self, freq: str | None = None) -> tuple[str, ...]:
        return (*self.source.fields(freq), *self.derived)

    def fingerprint(self) -> str:
        return digest([self.source.fingerprint(), self.derived])

    def _drop_missing_instruments(self, names: list[str], freq: str) -> list[str]:
        return self.source._drop_missing_instruments(names, freq)

    def read_bars(
        self, instruments: Sequence[str], fields: Sequence[str], freq: str, rows: slice
    ) -> Bars:
        expressions = {f: self.derived[f] for f in fields if f in self.derived}
        read_fields = [f for f in fields if f not in self.derived]
        read_fields += expression_fields([e for e in expressions.values() if e is not None])
        # Without any field to read, one says which bars exist.
        names = list(dict.fromkeys(read_fields)) or [self.source.fields(freq)[0]]
        bars = self.source.read_bars(instruments, names, freq, rows)
        panel = Panel(
            bars.values.permute(1, 2, 0),
            self.read_calendar(freq)[rows],
            instruments,
            names,
            spans=clip_spans(bars.spans, rows.stop - rows.start),
        )
        columns = []
        for field in fields:
            expression = expressions.get(field)
            if field not in expressions:
                columns.append(panel.column(field))
            elif expression is None:
                columns.append(torch.full(panel.shape[:2], float("nan")))
            else:
                columns.append(evaluate({field: expression}, panel).values[..., 0])
        return Bars(torch.stack(columns), bars.spans)
