"""Columns that are windows: Alpha360 of six raw fields, and frames that hold its 360 columns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qtorch.core.errors import ConfigError, DataError, unknown_name_message
from qtorch.data.panel.columns import Columns, PanelColumns
from qtorch.data.panel.elementwise import Chain, FusedChain
from qtorch.data.panel.gather import History, PackedColumns, check_fill
from qtorch.data.panel.panel import Panel

FIELDS = ("close", "open", "high", "low", "vwap", "volume")
VOLUME = "volume"
PRICE = "close"
EPSILON = 1e-12
LARGEST = 1e38  # the largest float32, with a margin


class WindowColumns(Columns):
    """The last `num_steps` days of each field over today's close (volume: over today's volume).

    Corresponds to Qlib's Alpha360 (qlib/contrib/data/loader.py), with the same names, order and
    float32 arithmetic: `CLOSE59 .. CLOSE0` is `Ref($close, k) / $close`, then OPEN, HIGH, LOW,
    VWAP; VOLUME is `Ref($volume, k) / ($volume + 1e-12)`. Steps are calendar rows, as `Ref` counts
    them, whether or not the row belongs to the universe; rows before the stored ones are NaN.
    A column is computed on request; batches gather `[B, num_steps, 6]` windows.

    `bars` has `lead` more calendar rows at the front than these columns have dates, so that
    the first date's window is complete.
    """

    def __init__(
        self,
        bars: Panel,
        names: Sequence[str] | None = None,
        *,
        fields: Sequence[str] = FIELDS,
        num_steps: int = 60,
        lead: int = 0,
        overrides: Mapping[str, Tensor] | None = None,
        chain: Chain | None = None,
    ) -> None:
        self.num_steps = num_steps
        self._bars = bars
        self.lead = lead
        self.fields = tuple(fields)
        cells = [(field, step) for field in self.fields for step in reversed(range(num_steps))]
        self._position = dict(zip(window_names(self.fields, num_steps), cells, strict=True))
        super().__init__(
            tuple(self._position) if names is None else names,
            bars.calendar[lead:],
            bars.instruments,
            overrides=overrides,
            chain=chain,
        )
        for field in (*self.fields, PRICE):
            bars.position(field)
        for name in self.names:
            if name not in self._overrides and name not in self._position:
                raise DataError(unknown_name_message("column", name, self._position))

    @property
    def device(self) -> torch.device:
        return self._bars.device

    def plain_panel(self) -> Panel | None:
        """Return the bars (`lead` rows before the dates) if nothing was modified, else None."""
        return None if self._overrides or len(self._chain) else self._bars

    @property
    def window_fields(self) -> tuple[str, ...] | None:
        """The fields if they are complete windows; None if single columns were removed or added."""
        known_names = [name for name in self.names if name in self._position]
        fields = tuple(dict.fromkeys(self._position[name][0] for name in known_names))
        is_complete = list(self.names) == window_names(fields, self.num_steps)
        return fields if fields and is_complete else None

    def window_shape(self, step_len: int) -> tuple[int, int]:
        fields = self.window_fields
        if step_len == 1 and fields is not None:
            return self.num_steps, len(fields)
        return super().window_shape(step_len)

    @property
    def num_bytes(self) -> int:
        d, n, _ = self.shape
        return 4 * n * (d + self.num_steps) * (len(self.fields) + len(self._overrides))

    def is_known_finite(self, names: Sequence[str] | None = None) -> bool:
        if self._overrides or len(self._chain):
            return False
        max_abs = {f: self._bars.column(f).abs().nan_to_num(0.0) for f in (*self.fields, PRICE)}
        price = self._bars.column(PRICE)[self.lead :].abs().nan_to_num(1.0)
        if not price.numel():
            return True
        min_divisor = {f: EPSILON if f == VOLUME else float(price.min()) for f in max_abs}
        return all(float(x.max()) < LARGEST * min_divisor[f] for f, x in max_abs.items())

    def _storage_column(self, name: str) -> Tensor:
        field, step = self._position[name]
        d, n = self.shape[:2]
        values, first = self._bars.column(field), self.lead - step
        today = self._bars.column(_normaliser(field))[self.lead :]
        if first >= 0:
            past = values[first : first + d]
        else:
            past = torch.full((d, n), torch.nan, device=self.device)
            if first + d > 0:
                past[-first:] = values[: first + d]
        return past / (today + EPSILON if field == VOLUME else today)

    def _derive(
        self, names: Sequence[str], overrides: Mapping[str, Tensor], chain: Chain
    ) -> WindowColumns:
        return WindowColumns(
            self._bars,
            names,
            fields=self.fields,
            num_steps=self.num_steps,
            lead=self.lead,
            overrides=overrides,
            chain=chain,
        )

    def _pack(
        self, device: torch.device, history: Tensor | None, step_len: int, dtype: torch.dtype
    ) -> PackedColumns:
        if dtype != torch.float32:
            raise ConfigError(
                f"feature_dtype={str(dtype).removeprefix('torch.')}: the windows of Alpha360 are "
                "computed from six fields of float32 when they are gathered; leave feature_dtype "
                "at float32."
            )
        whole_fields = self.window_fields
        fields = list(whole_fields or self.fields)
        if PRICE not in fields:
            fields.append(PRICE)
        d, n, _ = self.shape
        pad = self.num_steps - 1
        rows = min(pad, self.lead)
        values = torch.full((n, pad + d, len(fields)), torch.nan, device=device)
        for k, field in enumerate(fields):
            field_values = self._bars.column(field)[self.lead - rows :]
            values[:, pad - rows :, k] = field_values.t().to(device)
        override_names = [name for name in self.names if name in self._overrides]
        override_values = torch.empty(n, d, len(override_names), device=device)
        for k, name in enumerate(override_names):
            override_values[:, :, k] = self._overrides[name].t().to(device)
        return WindowPackedColumns(
            values,
            fields,
            self.names,
            num_steps=self.num_steps,
            num_fields=None if whole_fields is None else len(whole_fields),
            overrides=(override_names, override_values),
            fused_chain=self._chain.compile(self.names, device),
            history=history,
        )


class WindowPackedColumns(PackedColumns):
    """Raw fields `[N, num_steps - 1 + D, K]`; each window is normalised when it is gathered."""

    def __init__(
        self,
        values: Tensor,
        fields: Sequence[str],
        names: Sequence[str],
        *,
        num_steps: int,
        num_fields: int | None,
        overrides: tuple[Sequence[str], Tensor],
        fused_chain: FusedChain,
        history: Tensor | None,
    ) -> None:
        self.values, self.fields, self.names = values, tuple(fields), tuple(names)
        self._num_steps, self._num_fields = num_steps, num_fields
        self._override_names, self._overrides = tuple(overrides[0]), overrides[1]
        self.fused_chain = fused_chain
        n, rows, k = values.shape
        device = values.device
        self._dates = rows - num_steps + 1
        self.history = History(history, (self._dates, n), device)
        self._flat = values.reshape(n * rows, k)
        self._today = torch.tensor([self.fields.index(_normaliser(f)) for f in fields]).to(device)
        self._add = torch.tensor([EPSILON if f == VOLUME else 0.0 for f in fields]).to(device)
        if num_fields is not None:
            self._window_chain = FusedChain(
                [s.reshape_for_windows(num_steps) for s in fused_chain.stages]
            )
        self._columns = self._find_columns().to(device)

    def _find_columns(self) -> Tensor:
        """Find the position of each name among all windows' columns, followed by the overrides."""
        names = [*window_names(self.fields, self._num_steps), *self._override_names]
        position = {name: k for k, name in enumerate(names)}
        return torch.tensor([position[name] for name in self.names], dtype=torch.int64)

    def window_shape(self, step_len: int) -> tuple[int, int]:
        if step_len == 1 and self._num_fields is not None:
            return self._num_steps, self._num_fields
        return step_len, len(self.names)

    def gather(
        self, date: Tensor, instrument: Tensor, step_len: int = 1, fill: str = "none"
    ) -> Tensor:
        """Gather `[B, num_steps, F]` windows of complete fields for `step_len` 1.

        If single columns were removed or added, or `step_len` is longer, each step holds the flat
        columns: `[B, step_len, len(names)]`.
        """
        check_fill(fill)
        if step_len == 1 and self._num_fields is not None:
            x = self._gather_windows(date, instrument)[..., : self._num_fields]
            if self._override_names:
                x = self._overwrite(x, date, instrument)
            return self._window_chain(x)
        rows = self.history.rows(date, instrument, step_len, fill)
        dates = rows.clamp(min=0).reshape(-1)
        instruments = instrument[:, None].expand(-1, step_len).reshape(-1)
        x = self.gather_flat(dates, instruments).view(*rows.shape, -1)
        return x.masked_fill_((rows < 0)[..., None], torch.nan)

    def _gather_windows(self, date: Tensor, instrument: Tensor) -> Tensor:
        """Gather windows `[B, num_steps, K]`, normalised by the last step."""
        rows, k = self.values.shape[1:]
        steps = self._num_steps
        count = self._flat.shape[0] - steps + 1
        overlapping = self._flat.as_strided((count, steps * k), (k, 1), self._flat.storage_offset())
        x = overlapping.index_select(0, instrument * rows + date).view(-1, steps, k)
        today = x[:, -1].index_select(1, self._today).add_(self._add)
        return x.div_(today[:, None])

    def _overwrite(self, x: Tensor, date: Tensor, instrument: Tensor) -> Tensor:
        position = {name: k for k, name in enumerate(self.names)}
        columns = torch.tensor([position[name] for name in self._override_names], device=x.device)
        x = x.contiguous()
        x[:, columns % self._num_steps, columns // self._num_steps] = self._overrides[
            instrument, date
        ]
        return x

    def to(self, device: torch.device, step_len: int = 1) -> PackedColumns:
        return WindowPackedColumns(
            self.values.to(device),
            self.fields,
            self.names,
            num_steps=self._num_steps,
            num_fields=self._num_fields,
            overrides=(self._override_names, self._overrides.to(device)),
            fused_chain=self.fused_chain.to(device),
            history=self.history.exists,
        )

    @property
    def num_bytes(self) -> int:
        return 4 * (self.values.numel() + self._overrides.numel())

    def infinite_columns(self) -> Tensor:
        has_infinity = torch.zeros(len(self.names), dtype=torch.bool, device=self.device)
        price = self.values[:, :, self.fields.index(PRICE)]
        if not bool(self.values.isinf().any() | (price == 0).any() | self._overrides.isinf().any()):
            return has_infinity
        exists = self.history.exists
        n = self.values.shape[0]
        dates = torch.arange(self._dates, device=self.device)
        for instrument in range(n):
            existing = dates[exists[:, instrument]]
            x = self.gather_flat(existing, torch.full_like(existing, instrument))
            has_infinity |= x.isinf().any(0)
        return has_infinity

    def gather_flat(self, date: Tensor, instrument: Tensor) -> Tensor:
        """Gather the columns of one row, `[B, len(names)]`, in the order of the names."""
        x = self._gather_windows(date, instrument).transpose(1, 2).flatten(1)
        if self._override_names:
            x = torch.cat([x, self._overrides[instrument, date]], 1)
        return self.fused_chain(x.index_select(1, self._columns))


class StoredWindowColumns(PanelColumns):
    """Columns of a frame whose names are those of windows: `CLOSE59 .. CLOSE0, OPEN59, ...`.

    Alpha360 as Qlib computes it, or as a file holds it. Batches gather `[B, T, F]` windows, as
    from `WindowColumns`, as long as the fields are complete.
    """

    def window_shape(self, step_len: int) -> tuple[int, int]:
        num_steps = count_window_steps(self.names)
        if step_len == 1 and num_steps > 1:
            return num_steps, len(self.names) // num_steps
        return super().window_shape(step_len)

    def _derive(
        self, names: Sequence[str], overrides: Mapping[str, Tensor], chain: Chain
    ) -> StoredWindowColumns:
        return StoredWindowColumns(
            self._panel, names, overrides=overrides, chain=chain, finite_fields=self._finite_fields
        )

    def _pack(
        self, device: torch.device, history: Tensor | None, step_len: int, dtype: torch.dtype
    ) -> PackedColumns:
        rows = super()._pack(device, history, step_len, dtype)
        num_steps = count_window_steps(self.names)
        return rows if num_steps == 1 else StoredWindowPack(rows, num_steps)


class StoredWindowPack(PackedColumns):
    """Packed rows of complete windows, which are gathered as windows for `step_len` 1."""

    def __init__(self, rows: PackedColumns, num_steps: int) -> None:
        self._rows, self._num_steps = rows, num_steps
        self.values, self.history, self.fused_chain = rows.values, rows.history, rows.fused_chain

    def window_shape(self, step_len: int) -> tuple[int, int]:
        num_columns = int(self.values.shape[2])
        if step_len == 1:
            return self._num_steps, num_columns // self._num_steps
        return step_len, num_columns

    def gather(
        self, date: Tensor, instrument: Tensor, step_len: int = 1, fill: str = "none"
    ) -> Tensor:
        x = self._rows.gather(date, instrument, step_len, fill)
        if step_len > 1:
            return x
        return x.view(len(x), -1, self._num_steps).transpose(1, 2).contiguous()  # [B, T, F]

    def to(self, device: torch.device, step_len: int = 1) -> PackedColumns:
        return StoredWindowPack(self._rows.to(device, step_len), self._num_steps)

    @property
    def num_bytes(self) -> int:
        return self._rows.num_bytes

    def infinite_columns(self) -> Tensor:
        return self._rows.infinite_columns()


def count_window_steps(names: Sequence[str]) -> int:
    """Return T if the names are windows of T steps (`CLOSE1, CLOSE0, OPEN1, OPEN0`), or 1."""
    match = re.fullmatch(r"(.*?\D)(\d+)", names[0]) if names else None
    num_steps = int(match[2]) + 1 if match else 1
    if num_steps == 1 or len(names) % num_steps:
        return 1
    ending = str(num_steps - 1)
    fields = [name.removesuffix(ending) for name in names[::num_steps]]
    return num_steps if list(names) == _step_names(fields, num_steps) else 1


def window_names(fields: Sequence[str], num_steps: int) -> list[str]:
    """Return the column names of windows, field by field, the oldest day first: `CLOSE59`, ..."""
    return _step_names([field.upper() for field in fields], num_steps)


def _step_names(fields: Sequence[str], num_steps: int) -> list[str]:
    return [f"{field}{step}" for field in fields for step in reversed(range(num_steps))]


def _normaliser(field: str) -> str:
    return VOLUME if field == VOLUME else PRICE
