"""Named columns over dates and instruments: the input of processors and of batch gathering."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Self, TypeAlias

import pandas as pd
import torch
from torch import Tensor

from qtorch.core.errors import DataError, unknown_name_message
from qtorch.data.panel.elementwise import Chain, Elementwise
from qtorch.data.panel.gather import (
    DensePackedColumns,
    History,
    PackedColumns,
    allocate_storage,
)
from qtorch.data.panel.panel import Panel, duplicate_names

# Block sizes for copies between field-major and instrument-major storage, chosen so that the
# touched cache lines stay in the CPU cache.
DATE_BLOCK, INSTRUMENT_BLOCK = 32, 4
# Columns of up to this size are copied when packed, so that their chain of element-wise
# operations is applied once instead of to every batch.
MAX_COPY_BYTES = 256 << 20
# Instruments whose columns are float32 at a time, while they are packed in 16 bits.
ROUNDED_AT_ONCE = 32
# If an instrument's columns are adjacent, sixteen of them share a cache line: reading them together
# costs hardly more than reading one.
COLUMNS_AT_ONCE = 16


def column_parts(names: Sequence[str]) -> list[Sequence[str]]:
    """Split names into parts that are read together by `Columns.block`."""
    return [names[k : k + COLUMNS_AT_ONCE] for k in range(0, len(names), COLUMNS_AT_ONCE)]


class Columns(ABC):
    """Named float32 columns over a calendar (D) and instruments (N). Immutable.

    Columns that are derived from others (`with_elementwise`, `with_columns`, `keep`) share their
    storage; only the columns that a processor writes take new memory. NaN is a missing value.
    """

    def __init__(
        self,
        names: Sequence[str],
        calendar: pd.DatetimeIndex,
        instruments: pd.Index,
        *,
        overrides: Mapping[str, Tensor] | None = None,
        chain: Chain | None = None,
    ) -> None:
        self.names = tuple(names)
        self.calendar = calendar
        self.instruments = instruments
        self._overrides = dict(overrides or {})
        self._chain = chain or Chain()
        self._packs: dict[PackKey, weakref.ref[PackedColumns]] = {}
        if len(set(self.names)) != len(self.names):
            duplicates = duplicate_names(self.names)
            raise DataError(f"column names must be unique, got duplicates: {duplicates}.")

    # -- to implement in subclasses ------------------------------------------------------------

    @abstractmethod
    def _storage_column(self, name: str) -> Tensor:
        """Return a column `[D, N]` of the shared storage before the chain; do not write to it."""

    @abstractmethod
    def _derive(self, names: Sequence[str], overrides: Mapping[str, Tensor], chain: Chain) -> Self:
        """Return columns on the same storage with other names, overrides and chain."""

    @abstractmethod
    def _pack(
        self, device: torch.device, history: Tensor | None, step_len: int, dtype: torch.dtype
    ) -> PackedColumns:
        """Lay the columns out as `pack` describes, without looking for a shared pack."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of the storage."""

    # -- access --------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(D, N, F)`."""
        return len(self.calendar), len(self.instruments), len(self.names)

    @property
    def num_bytes(self) -> int:
        """The approximate size of the packed columns."""
        d, n, f = self.shape
        return 4 * d * n * f

    def window_shape(self, step_len: int) -> tuple[int, int]:
        """Return `(T, F)` of the windows that a pack gathers for a dataset's `step_len`."""
        return step_len, len(self.names)

    def column(self, name: str) -> Tensor:
        """Return one column `[D, N]` after every operation; do not write to it."""
        self._check_names([name])
        raw = self._raw_column(name)
        fused_chain = self._chain.compile([name], self.device)
        # Clone, because a stage may write in place and other views share the storage.
        return fused_chain(raw[..., None].clone())[..., 0] if len(fused_chain) else raw

    def block(
        self, names: Sequence[str], *, rows: slice | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Return several columns `[K, D, N]`, each contiguous; the caller may write to this copy.

        `rows` selects dates. `out` is a buffer to reuse: allocating new memory costs more than the
        work that is done with it.
        """
        self._check_names(names)
        dates = slice(0, self.shape[0]) if rows is None else rows
        if out is None:
            shape = (len(names), dates.stop - dates.start, self.shape[1])
            out = torch.empty(shape, device=self.device)
        self._write_block(list(names), out, dates)
        fused_chain = self._chain.compile(list(names), self.device)
        return fused_chain(out.permute(1, 2, 0)).permute(2, 0, 1) if len(fused_chain) else out

    def is_known_finite(self, names: Sequence[str] | None = None) -> bool:
        """Whether some columns (None: all) are known to hold no infinity; False means unknown."""
        return False

    def _write_block(self, names: Sequence[str], out: Tensor, rows: slice) -> None:
        """Write the raw columns of the dates `rows` into `out [K, D, N]`."""
        for k, name in enumerate(names):
            out[k] = self._raw_column(name)[rows]

    def _raw_column(self, name: str) -> Tensor:
        return self._overrides[name] if name in self._overrides else self._storage_column(name)

    def _check_names(self, names: Sequence[str]) -> None:
        existing = set(self.names)
        for name in names:
            if name not in existing:
                raise DataError(unknown_name_message("column", name, self.names))

    # -- derived columns -----------------------------------------------------------------------

    def with_elementwise(self, names: Sequence[str], operation: Elementwise) -> Self:
        """Return these columns with an operation that is applied when `names` are read or gathered.

        `operation` holds one parameter set for each of `names`, in their order, or one for all.
        """
        self._check_names(names)
        return self._derive(
            self.names, self._overrides, self._chain.with_operation(names, operation)
        )

    def with_columns(self, columns: Mapping[str, Tensor]) -> Self:
        """Return these columns with some replaced by tensors `[D, N]`, or with new ones appended.

        The tensors are not copied, so the caller must not write to them afterwards. Earlier
        element-wise operations no longer act on a replaced column.
        """
        for name, values in columns.items():
            if tuple(values.shape) != self.shape[:2]:
                raise DataError(
                    f"column {name!r} has shape {tuple(values.shape)}, expected "
                    f"{self.shape[:2]} (dates, instruments)."
                )
        tensors = {n: v.to(dtype=torch.float32, device=self.device) for n, v in columns.items()}
        existing = set(self.names)
        names = [*self.names, *(n for n in tensors if n not in existing)]
        return self._derive(names, {**self._overrides, **tensors}, self._chain.drop(list(tensors)))

    def keep(self, names: Sequence[str]) -> Self:
        """Return only these columns, in the given order."""
        self._check_names(names)
        name_set = set(names)
        overrides = {n: v for n, v in self._overrides.items() if n in name_set}
        dropped_names = [n for n in self.names if n not in name_set]
        return self._derive(tuple(names), overrides, self._chain.drop(dropped_names))

    def pack(
        self,
        device: torch.device | str = "cpu",
        *,
        history: Tensor | None = None,
        step_len: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> PackedColumns:
        """Lay the columns out for gathering windows, on `device`, stored in `dtype`.

        `history [D, N]` bool marks the rows that exist; windows show the others as missing (None:
        all rows exist). Nothing is copied if the storage is on the device, laid out by instrument
        and holds exactly these columns; the chain is then applied to each batch. Otherwise the copy
        has the chain applied already. Small columns with a chain are copied as well, because one
        copy is cheaper than applying the chain to every batch. A copy has room for the filled
        windows of `step_len`. Callers that ask for the same device
        and history share one pack as long as one of them holds it.
        """
        target = torch.device(device)
        existing = self.find_shared_pack(target, history, dtype)
        if existing is not None:
            return existing
        packed_columns = self._pack(target, history, step_len, dtype)
        packed_columns.source_history = history
        self._packs[_pack_key(target, history, dtype)] = weakref.ref(packed_columns)
        return packed_columns

    def find_shared_pack(
        self,
        device: torch.device,
        history: Tensor | None,
        dtype: torch.dtype = torch.float32,
    ) -> PackedColumns | None:
        """Return the pack that a caller still holds and `pack` would share, or None."""
        reference = self._packs.get(_pack_key(device, history, dtype))
        packed_columns = reference() if reference is not None else None
        # The key has the identity of the history, which a new tensor may inherit from a freed one.
        is_same = packed_columns is not None and (
            history is None or packed_columns.source_history is history
        )
        return packed_columns if is_same else None

    def __repr__(self) -> str:
        d, n, f = self.shape
        return f"{type(self).__name__}({d} dates, {n} instruments, {f} columns)"

    def __getstate__(self) -> dict[str, object]:
        # Weak references cannot be pickled.
        return {**self.__dict__, "_packs": {}}


PackKey: TypeAlias = tuple[torch.device, int, torch.dtype]


def _pack_key(device: torch.device, history: Tensor | None, dtype: torch.dtype) -> PackKey:
    return device, 0 if history is None else id(history), dtype


class PanelColumns(Columns):
    """Columns over a Panel's storage, of any strides.

    Storage made by `instrument_major` is gathered without a copy. `finite_fields` names fields of
    the panel that are known to hold no infinity, so that they need not be checked.
    """

    def __init__(
        self,
        panel: Panel,
        names: Sequence[str] | None = None,
        *,
        overrides: Mapping[str, Tensor] | None = None,
        chain: Chain | None = None,
        finite_fields: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(
            panel.fields if names is None else names,
            panel.calendar,
            panel.instruments,
            overrides=overrides,
            chain=chain,
        )
        self._panel = panel
        self._finite_fields = finite_fields
        for name in self.names:
            if name not in self._overrides:
                panel.position(name)  # raises DataError for an unknown field

    @property
    def device(self) -> torch.device:
        return self._panel.device

    def is_known_finite(self, names: Sequence[str] | None = None) -> bool:
        name_set = set(self.names if names is None else names)
        known_finite = self._finite_fields.difference(self._overrides)
        return not len(self._chain) and name_set <= known_finite

    def plain_panel(self) -> Panel | None:
        """Return the panel if these columns are exactly its fields, unmodified; else None."""
        return self._panel if self._has_panel_columns() and not len(self._chain) else None

    def _storage_column(self, name: str) -> Tensor:
        return self._panel.column(name)

    def _derive(
        self, names: Sequence[str], overrides: Mapping[str, Tensor], chain: Chain
    ) -> PanelColumns:
        return PanelColumns(
            self._panel, names, overrides=overrides, chain=chain, finite_fields=self._finite_fields
        )

    def _write_block(self, names: Sequence[str], out: Tensor, rows: slice) -> None:
        self._write_columns(names, out.permute(1, 2, 0), rows)

    def _write_columns(
        self, names: Sequence[str], out: Tensor, rows: slice, part: slice = slice(None)
    ) -> None:
        """Write the raw columns of dates and instruments into `out [D, N, K]` of any strides."""
        column_pairs = [
            (k, self._panel.position(n)) for k, n in enumerate(names) if n not in self._overrides
        ]
        if column_pairs:
            _copy_columns(self._panel.values[rows, part], out, column_pairs)
        for k, name in enumerate(names):
            if name in self._overrides:
                out[:, :, k] = self._overrides[name][rows, part]

    def _has_panel_columns(self) -> bool:
        """Whether the columns before the chain are exactly the panel's fields, in their order."""
        return not self._overrides and self.names == self._panel.fields

    def _pack(
        self, device: torch.device, history: Tensor | None, step_len: int, dtype: torch.dtype
    ) -> PackedColumns:
        if dtype != torch.float32:
            return self._pack_as_dtype(device, history, step_len, dtype)
        values = self._panel.values.permute(1, 0, 2)
        fused_chain = self._chain.compile(self.names, device)
        # Laid out by instrument, as a pack needs it.
        is_laid_out = self._has_panel_columns() and values.is_contiguous()
        is_small = values.numel() * values.element_size() <= MAX_COPY_BYTES
        if is_laid_out and device == values.device and not (len(fused_chain) and is_small):
            return DensePackedColumns(
                values,
                history=history,
                fused_chain=fused_chain,
                is_finite=self._finite_fields.issuperset(self.names),
            )
        d, n, f = self.shape
        rows = History(history, (d, n), device)
        storage = allocate_storage((n, d, f), device, rows, step_len)
        out = storage[: n * d].view(n, d, f)
        if is_laid_out:
            out.copy_(values)
        else:
            self._write_columns(self.names, out.permute(1, 0, 2), slice(0, d))
        if len(fused_chain):
            # In blocks of instruments, because the chain may need temporary memory.
            for first in range(0, n, 32):
                part = out[first : first + 32]
                result = fused_chain(part)
                if result is not part:  # else the chain has written in place
                    part.copy_(result)
        return DensePackedColumns(out, history=rows, owns_values=True, storage=storage)

    def _pack_as_dtype(
        self, device: torch.device, history: Tensor | None, step_len: int, dtype: torch.dtype
    ) -> PackedColumns:
        """Store the results of the chain in another dtype."""
        d, n, f = self.shape
        fused_chain = self._chain.compile(self.names, device)
        rows = History(history, (d, n), device)
        storage = allocate_storage((n, d, f), device, rows, step_len, dtype)
        out = storage[: n * d].view(n, d, f)
        for first in range(0, n, ROUNDED_AT_ONCE):
            part = slice(first, first + ROUNDED_AT_ONCE)
            values = torch.empty(out[part].shape, device=device)
            self._write_columns(self.names, values.permute(1, 0, 2), slice(0, d), part)
            out[part] = fused_chain(values)
        return DensePackedColumns(out, history=rows, owns_values=True, storage=storage)


def instrument_major(num_dates: int, num_instruments: int, num_fields: int) -> Tensor:
    """Allocate values `[D, N, F]` whose storage is `[N, D, F]`, so that packing needs no copy."""
    return torch.empty(num_instruments, num_dates, num_fields).permute(1, 0, 2)


def _copy_columns(values: Tensor, out: Tensor, column_pairs: Sequence[tuple[int, int]]) -> None:
    """Copy `out[:, :, t] = values[:, :, s]` for each pair (t, s), in blocks that fit the cache."""
    target, source = [t for t, _ in column_pairs], [s for _, s in column_pairs]
    is_target_consecutive = _is_consecutive(target)
    if is_target_consecutive and values.stride(2) == 1 and not _is_consecutive(source):
        # The columns of an instrument are adjacent: pick all of them in one pass over the values.
        source_index = torch.tensor(source, device=values.device)
        for first in range(0, values.shape[1], INSTRUMENT_BLOCK):
            part = slice(first, first + INSTRUMENT_BLOCK)
            out[:, part, target[0] : target[-1] + 1] = values[:, part].index_select(2, source_index)
        return
    for first in range(0, values.shape[0], DATE_BLOCK):
        rows = slice(first, first + DATE_BLOCK)
        if is_target_consecutive and _is_consecutive(source):  # one copy of a slice
            out[rows, :, target[0] : target[-1] + 1] = values[rows, :, source[0] : source[-1] + 1]
            continue
        for t, s in column_pairs:
            out[rows, :, t] = values[rows, :, s]


def _is_consecutive(positions: Sequence[int]) -> bool:
    return all(b - a == 1 for a, b in pairwise(positions))
