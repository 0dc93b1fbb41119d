"""What a batch takes of each sample beside its window."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class SampleTable:
    """Columns of samples, gathered by row number.

    `places` are integers `[S]` (a sample's date, its instrument, where its window begins),
    `values` float `[S]` or `[S, Q]`, or None. A matrix of one column is gathered as a vector, for
    which torch is four times as quick.
    """

    def __init__(self, places: Sequence[Tensor], values: Sequence[Tensor | None]) -> None:
        self._places, self._values = tuple(places), tuple(values)
        self._vectors = [v if v is None or not _single(v) else v.reshape(-1) for v in values]

    def holds(self, values: Sequence[Tensor | None]) -> bool:
        """Whether the table was made of these very values."""
        return all(a is b for a, b in zip(self._values, values, strict=True))

    def places(self, rows: Tensor) -> list[Tensor]:
        """Each of the places at `rows`, int64 `[B]`; new memory."""
        return [place.index_select(0, rows) for place in self._places]

    def values(self, rows: Tensor) -> list[Tensor | None]:
        """Each of the values at `rows`, `[B]` or `[B, Q]` as it was given, None where it was None;
        new memory."""
        found = [None if v is None else v.index_select(0, rows) for v in self._vectors]
        return [
            f.unsqueeze(1) if f is not None and v is not None and _single(v) else f
            for f, v in zip(found, self._values, strict=True)
        ]


def _single(values: Tensor) -> bool:
    return values.dim() == 2 and values.shape[1] == 1
