"""The per-sample values of a batch other than its window: indices, labels and weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class SampleTable:
    """Columns of samples, gathered by row number.

    `indices` are integers `[S]` (a sample's date, its instrument, where its window begins),
    `values` float `[S]` or `[S, Q]`, or None. A matrix of one column is gathered as a vector, which
    is four times as fast in torch.
    """

    def __init__(self, indices: Sequence[Tensor], values: Sequence[Tensor | None]) -> None:
        self._indices, self._values = tuple(indices), tuple(values)
        self._vectors = [v if v is None or not _single(v) else v.reshape(-1) for v in values]

    def has_values(self, values: Sequence[Tensor | None]) -> bool:
        """Whether the table was built from exactly these value tensors."""
        return all(a is b for a, b in zip(self._values, values, strict=True))

    def indices(self, rows: Tensor) -> list[Tensor]:
        """Gather each index tensor at `rows`, int64 `[B]`; the results are new memory."""
        return [index.index_select(0, rows) for index in self._indices]

    def values(self, rows: Tensor) -> list[Tensor | None]:
        """Gather each value tensor at `rows`, as `[B]` or `[B, Q]`; None stays None.

        The results are new memory.
        """
        vectors = [None if v is None else v.index_select(0, rows) for v in self._vectors]
        return [
            f.unsqueeze(1) if f is not None and v is not None and _single(v) else f
            for f, v in zip(vectors, self._values, strict=True)
        ]


def _single(values: Tensor) -> bool:
    return values.dim() == 2 and values.shape[1] == 1
