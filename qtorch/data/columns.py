"""Named columns over `[D, N]`: what processors change and batches are gathered from."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Self

import pandas as pd
import torch
from torch import Tensor

from qtorch.core.errors import DataError, unknown_name
from qtorch.data.elementwise import Chain, Elementwise
from qtorch.data.gather import DensePacked, Packed
from qtorch.data.panel import Panel

# What is copied at a time between field-major and instrument-major storage, so that the lines
# touched stay in the cache.
DATES, INSTRUMENTS = 32, 4
# Up to here, columns with a chain are copied and the chain is applied once, not to each batch.
COPIED_BYTES = 256 << 20


class Columns(ABC):
    """Named columns of float32 over a calendar (D) and instruments (N). Immutable.

    Columns made from others (`with_elementwise`, `with_columns`, `keep`) share their storage:
    only what a processor writes is new memory. NaN is a missing value.
    """

    def __init__(
        self,
        names: Sequence[str],
        calendar: pd.DatetimeIndex,
        instruments: pd.Index,
        *,
        owned: Mapping[str, Tensor] | None = None,
        chain: Chain | None = None,
    ) -> None:
        self.names = tuple(names)
        self.calendar = calendar
        self.instruments = instruments
        self._owned = dict(owned or {})
        self._chain = chain or Chain()
        self._packs: dict[tuple[torch.device, int], weakref.ref[Packed]] = {}
        if len(set(self.names)) != len(self.names):
            twice = pd.Index(self.names)[pd.Index(self.names).duplicated()].tolist()[:5]
            raise DataError(f"each column may stand once; given twice: {twice}.")

    # -- what a subclass says ------------------------------------------------------------------

    @abstractmethod
    def _stored(self, name: str) -> Tensor:
        """`[D, N]`, a column of the shared storage before the chain; it is not written to."""

    @abstractmethod
    def _derive(self, names: Sequence[str], owned: Mapping[str, Tensor], chain: Chain) -> Self:
        """The same storage with other names, owned columns and chain."""

    @abstractmethod
    def _pack(self, device: torch.device, history: Tensor | None) -> Packed:
        """The storage for gathering, on `device`."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the storage lies."""

    # -- access --------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(D, N, F)`."""
        return len(self.calendar), len(self.instruments), len(self.names)

    @property
    def num_bytes(self) -> int:
        """What the packed columns will take, about."""
        d, n, f = self.shape
        return 4 * d * n * f

    def window_shape(self, step_len: int) -> tuple[int, int]:
        """`(T, F)` of the windows that a pack gathers for a dataset's `step_len`."""
        return step_len, len(self.names)

    def column(self, name: str) -> Tensor:
        """One column `[D, N]` as it stands after every operation; not to be written to."""
        self._check([name])
        raw = self._raw(name)
        fused = self._chain.compile([name], self.device)
        # clone: a stage may write in place, and the storage belongs to other views too.
        return fused(raw[..., None].clone())[..., 0] if len(fused) else raw

    def block(
        self, names: Sequence[str], *, rows: slice | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Several columns `[K, D, N]`, each contiguous: a copy that the caller may write to.

        Where the storage keeps an instrument's columns side by side, reading sixteen at once
        costs hardly more than reading one. `rows` takes some dates alone; `out` is memory to
        use again (fresh memory costs more than what is done with it).
        """
        self._check(names)
        dates = slice(0, self.shape[0]) if rows is None else rows
        if out is None:
            shape = (len(names), dates.stop - dates.start, self.shape[1])
            out = torch.empty(shape, device=self.device)
        self._fill(list(names), out, dates)
        fused = self._chain.compile(list(names), self.device)
        return fused(out.permute(1, 2, 0)).permute(2, 0, 1) if len(fused) else out

    def is_surely_finite(self, names: Sequence[str] | None = None) -> bool:
        """Whether infinities are excluded in some columns (None: all); False means: not known."""
        return False

    def _fill(self, names: Sequence[str], out: Tensor, rows: slice) -> None:
        """Raw columns of the dates `rows` into `out [K, D, N]`."""
        for k, name in enumerate(names):
            out[k] = self._raw(name)[rows]

    def _raw(self, name: str) -> Tensor:
        owned = self._owned.get(name)
        return self._stored(name) if owned is None else owned

    def _check(self, names: Sequence[str]) -> None:
        known = set(self.names)
        for name in names:
            if name not in known:
                raise DataError(unknown_name("column", name, self.names))

    # -- derived -------------------------------------------------------------------------------

    def with_elementwise(self, names: Sequence[str], operation: Elementwise) -> Self:
        """These columns with an operation that is applied when they are read or gathered.

        `operation` holds one parameter set for each of `names`, in their order, or one for all.
        """
        self._check(names)
        return self._derive(self.names, self._owned, self._chain.then(names, operation))

    def with_columns(self, columns: Mapping[str, Tensor]) -> Self:
        """These columns with some replaced, or added at the end, by `[D, N]` tensors.

        The tensors are kept as they are: the caller does not write to them afterwards. Earlier
        element-wise operations no longer act on a replaced column.
        """
        for name, values in columns.items():
            if tuple(values.shape) != self.shape[:2]:
                raise DataError(
                    f"column {name!r} has shape {tuple(values.shape)}, expected "
                    f"{self.shape[:2]} (dates, instruments)."
                )
        given = {n: v.to(dtype=torch.float32, device=self.device) for n, v in columns.items()}
        known = set(self.names)
        names = [*self.names, *(n for n in given if n not in known)]
        return self._derive(names, {**self._owned, **given}, self._chain.without(list(given)))

    def keep(self, names: Sequence[str]) -> Self:
        """Only these columns, in the order given."""
        self._check(names)
        wanted = set(names)
        owned = {n: v for n, v in self._owned.items() if n in wanted}
        gone = [n for n in self.names if n not in wanted]
        return self._derive(tuple(names), owned, self._chain.without(gone))

    def pack(self, device: torch.device | str = "cpu", *, history: Tensor | None = None) -> Packed:
        """The columns laid out for gathering windows, on `device`.

        `history [D, N]` bool says which rows exist; a window shows the others as missing (all
        exist if it is not given). Nothing is copied where the storage is on the device, laid out
        by instrument and holds exactly these columns; the chain is then applied to each batch.
        Otherwise (and where a chain meets few bytes, as a copy costs less than its repetition)
        the copy has the chain applied already. One pack is shared by all who ask for
        the same device and history as long as somebody holds it.
        """
        target = torch.device(device)
        found = self.shared_pack(target, history)
        if found is not None:
            return found
        packed = self._pack(target, history)
        packed.source_history = history
        self._packs[_key(target, history)] = weakref.ref(packed)
        return packed

    def shared_pack(self, device: torch.device, history: Tensor | None) -> Packed | None:
        """The pack that somebody holds already, which `pack` would give; None if there is none."""
        shared = self._packs.get(_key(device, history))
        found = shared() if shared is not None else None
        same = found is not None and (history is None or found.source_history is history)
        return found if same else None

    def __repr__(self) -> str:
        d, n, f = self.shape
        return f"{type(self).__name__}({d} dates, {n} instruments, {f} columns)"

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_packs": {}}


def _key(device: torch.device, history: Tensor | None) -> tuple[torch.device, int]:
    return device, 0 if history is None else id(history)


class PanelColumns(Columns):
    """Columns over a Panel's storage, of any strides.

    Give storage made by `instrument_major` to have it gathered without a copy. `finite` names
    fields of the panel that are known to hold no infinity, so that nobody has to look.
    """

    def __init__(
        self,
        panel: Panel,
        names: Sequence[str] | None = None,
        *,
        owned: Mapping[str, Tensor] | None = None,
        chain: Chain | None = None,
        finite: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(
            panel.fields if names is None else names,
            panel.calendar,
            panel.instruments,
            owned=owned,
            chain=chain,
        )
        self._panel = panel
        self._finite = finite
        for name in self.names:
            if name not in self._owned:
                panel.position(name)

    @property
    def device(self) -> torch.device:
        return self._panel.device

    def is_surely_finite(self, names: Sequence[str] | None = None) -> bool:
        wanted = set(self.names if names is None else names)
        known = self._finite.difference(self._owned)
        return not len(self._chain) and wanted <= known

    def bare_panel(self) -> Panel | None:
        """The panel where these columns are just that: none replaced, taken out or operated on."""
        return self._panel if self._is_whole() and not len(self._chain) else None

    def _stored(self, name: str) -> Tensor:
        return self._panel.column(name)

    def _derive(
        self, names: Sequence[str], owned: Mapping[str, Tensor], chain: Chain
    ) -> PanelColumns:
        return PanelColumns(self._panel, names, owned=owned, chain=chain, finite=self._finite)

    def _fill(self, names: Sequence[str], out: Tensor, rows: slice) -> None:
        self._copy(names, out.permute(1, 2, 0), rows)

    def _copy(self, names: Sequence[str], out: Tensor, rows: slice) -> None:
        """Raw columns of the dates `rows` into `out [D, N, K]` of any strides."""
        stored = [(k, self._panel.position(n)) for k, n in enumerate(names) if n not in self._owned]
        if stored:
            _copy_columns(self._panel.values[rows], out, stored)
        for k, name in enumerate(names):
            if name in self._owned:
                out[:, :, k] = self._owned[name][rows]

    def _is_whole(self) -> bool:
        return not self._owned and self.names == self._panel.fields

    def _pack(self, device: torch.device, history: Tensor | None) -> Packed:
        values = self._panel.values.permute(1, 0, 2)
        small = values.numel() * values.element_size() <= COPIED_BYTES
        if (
            self._is_whole()
            and values.is_contiguous()
            and device == values.device
            and not (len(self._chain) and small)
        ):
            return DensePacked(
                values,
                history=history,
                fused=self._chain.compile(self.names, device),
                finite=self._finite.issuperset(self.names),
            )
        d, n, f = self.shape
        out = torch.empty(n, d, f, device=device)
        fused = self._chain.compile(self.names, device)
        if self._is_whole() and values.is_contiguous():
            out.copy_(values)
        else:
            self._copy(self.names, out.permute(1, 0, 2), slice(0, d))
        if len(fused):
            for first in range(0, n, 32):
                part = out[first : first + 32]
                result = fused(part)
                if result is not part:
                    part.copy_(result)
        return DensePacked(out, history=history, own=True)


def instrument_major(num_dates: int, num_instruments: int, num_fields: int) -> Tensor:
    """Uninitialised values `[D, N, F]` whose storage is `[N, D, F]`: packing them is free."""
    return torch.empty(num_instruments, num_dates, num_fields).permute(1, 0, 2)


def _copy_columns(values: Tensor, out: Tensor, places: Sequence[tuple[int, int]]) -> None:
    """`out[:, :, t] = values[:, :, s]` for each (t, s)."""
    target, source = [t for t, _ in places], [s for _, s in places]
    together = _adjacent(target)
    if together and values.stride(2) == 1 and not _adjacent(source):
        chosen = torch.tensor(source, device=values.device)
        for first in range(0, values.shape[1], INSTRUMENTS):
            part = slice(first, first + INSTRUMENTS)
            out[:, part, target[0] : target[-1] + 1] = values[:, part].index_select(2, chosen)
        return
    for first in range(0, values.shape[0], DATES):
        rows = slice(first, first + DATES)
        if together and _adjacent(source):
            out[rows, :, target[0] : target[-1] + 1] = values[rows, :, source[0] : source[-1] + 1]
            continue
        for t, s in places:
            out[rows, :, t] = values[rows, :, s]


def _adjacent(places: Sequence[int]) -> bool:
    return all(b - a == 1 for a, b in pairwise(places))
