"""Alpha360 without its 360 columns: normalised windows of six raw fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qtorch.core.errors import DataError, unknown_name
from qtorch.data.columns import Columns
from qtorch.data.elementwise import Chain, Fused
from qtorch.data.gather import NAN, History, Packed, check_fill
from qtorch.data.panel import Panel

FIELDS = ("close", "open", "high", "low", "vwap", "volume")
VOLUME = "volume"
PRICE = "close"
EPSILON = 1e-12
LARGEST = 1e38  # of float32, with some room


class WindowColumns(Columns):
    """The last `num_steps` days of each field over today's close (volume: over today's volume).

    Answers to Qlib's Alpha360 (qlib/contrib/data/loader.py), same names, order and float32
    arithmetic: `CLOSE59 .. CLOSE0` is `Ref($close, k) / $close`, then OPEN, HIGH, LOW, VWAP;
    VOLUME is `Ref($volume, k) / ($volume + 1e-12)`. Steps are calendar rows, as `Ref` counts
    them, whether or not the row belongs to the universe; rows before the stored ones are NaN.
    A column is computed when it is asked for; batches gather `[B, num_steps, 6]` windows.

    `bars` holds `lead` more calendar rows at the front than these columns have dates, so that
    the first date's window is whole.
    """

    def __init__(
        self,
        bars: Panel,
        names: Sequence[str] | None = None,
        *,
        fields: Sequence[str] = FIELDS,
        num_steps: int = 60,
        lead: int = 0,
        owned: Mapping[str, Tensor] | None = None,
        chain: Chain | None = None,
    ) -> None:
        self.num_steps = num_steps
        self._bars = bars
        self._lead = lead
        self._fields = tuple(fields)
        self._place = {
            f"{field.upper()}{step}": (field, step)
            for field in self._fields
            for step in range(num_steps - 1, -1, -1)
        }
        super().__init__(
            tuple(self._place) if names is None else names,
            bars.calendar[lead:],
            bars.instruments,
            owned=owned,
            chain=chain,
        )
        for field in (*self._fields, PRICE):
            bars.position(field)
        for name in self.names:
            if name not in self._owned and name not in self._place:
                raise DataError(unknown_name("column", name, self._place))

    @property
    def device(self) -> torch.device:
        return self._bars.device

    def bare_panel(self) -> Panel | None:
        """The bars where nothing was replaced or operated on; `lead` rows come before the dates."""
        return None if self._owned or len(self._chain) else self._bars

    @property
    def lead(self) -> int:
        """How many rows of the bars come before the first date."""
        return self._lead

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that have windows."""
        return self._fields

    @property
    def window_fields(self) -> tuple[str, ...] | None:
        """The fields of whole windows, or None where single columns were taken out or added."""
        count, rest = divmod(len(self.names), self.num_steps)
        if rest or not count:
            return None
        fields = []
        for k in range(count):
            part = self.names[k * self.num_steps : (k + 1) * self.num_steps]
            field = self._place.get(part[0], ("", 0))[0]
            steps = range(self.num_steps - 1, -1, -1)
            if part != tuple(f"{field.upper()}{step}" for step in steps):
                return None
            fields.append(field)
        return tuple(fields)

    def window_shape(self, step_len: int) -> tuple[int, int]:
        fields = self.window_fields
        if step_len == 1 and fields is not None:
            return self.num_steps, len(fields)
        return super().window_shape(step_len)

    @property
    def num_bytes(self) -> int:
        d, n, _ = self.shape
        return 4 * n * (d + self.num_steps) * (len(self._fields) + len(self._owned))

    def is_surely_finite(self, names: Sequence[str] | None = None) -> bool:
        if self._owned or len(self._chain):
            return False
        size = {f: self._bars.column(f).abs().nan_to_num(0.0) for f in (*self._fields, PRICE)}
        price = self._bars.column(PRICE)[self._lead :].abs().nan_to_num(1.0)
        if not price.numel():
            return True
        least = {f: EPSILON if f == VOLUME else float(price.min()) for f in size}
        return all(float(x.max()) < LARGEST * least[f] for f, x in size.items())

    def _stored(self, name: str) -> Tensor:
        field, step = self._place[name]
        d, n = self.shape[:2]
        values, first = self._bars.column(field), self._lead - step
        today = self._bars.column(_normaliser(field))[self._lead :]
        if first >= 0:
            past = values[first : first + d]
        else:
            past = torch.full((d, n), NAN, device=self.device)
            if first + d > 0:
                past[-first:] = values[: first + d]
        return past / (today + EPSILON if field == VOLUME else today)

    def _derive(
        self, names: Sequence[str], owned: Mapping[str, Tensor], chain: Chain
    ) -> WindowColumns:
        return WindowColumns(
            self._bars,
            names,
            fields=self._fields,
            num_steps=self.num_steps,
            lead=self._lead,
            owned=owned,
            chain=chain,
        )

    def _pack(self, device: torch.device, history: Tensor | None) -> Packed:
        whole = self.window_fields
        fields = list(whole or self._fields)
        if PRICE not in fields:
            fields.append(PRICE)
        d, n, _ = self.shape
        pad = self.num_steps - 1
        rows = min(pad, self._lead)
        values = torch.full((n, pad + d, len(fields)), NAN, device=device)
        for k, field in enumerate(fields):
            stored = self._bars.column(field)[self._lead - rows :]
            values[:, pad - rows :, k] = stored.t().to(device)
        owned = [name for name in self.names if name in self._owned]
        written = torch.empty(n, d, len(owned), device=device)
        for k, name in enumerate(owned):
            written[:, :, k] = self._owned[name].t().to(device)
        return WindowPacked(
            values,
            fields,
            self.names,
            num_steps=self.num_steps,
            num_fields=None if whole is None else len(whole),
            owned=(owned, written),
            fused=self._chain.compile(self.names, device),
            history=history,
        )


class WindowPacked(Packed):
    """Raw fields `[N, num_steps - 1 + D, K]`; each window is normalised when it is gathered."""

    def __init__(
        self,
        values: Tensor,
        fields: Sequence[str],
        names: Sequence[str],
        *,
        num_steps: int,
        num_fields: int | None,
        owned: tuple[Sequence[str], Tensor],
        fused: Fused,
        history: Tensor | None,
    ) -> None:
        self.values, self.fields, self.names = values, tuple(fields), tuple(names)
        self._num_steps, self._num_fields = num_steps, num_fields
        self._owned_names, self._owned = tuple(owned[0]), owned[1]
        self.fused = fused
        n, rows, k = values.shape
        device = values.device
        self._dates = rows - num_steps + 1
        self.history = History(history, (self._dates, n), device)
        self._flat = values.reshape(n * rows, k)
        self._today = torch.tensor([self.fields.index(_normaliser(f)) for f in fields]).to(device)
        self._add = torch.tensor([EPSILON if f == VOLUME else 0.0 for f in fields]).to(device)
        if num_fields is not None:
            self._grid = Fused([s.windowed(num_steps) for s in fused.stages])
        self._columns = self._find_columns().to(device)

    def _find_columns(self) -> Tensor:
        """For each name its place among all windows' columns, then the owned ones."""
        place = {
            f"{field.upper()}{step}": k * self._num_steps + self._num_steps - 1 - step
            for k, field in enumerate(self.fields)
            for step in range(self._num_steps)
        }
        base = len(place)
        place.update({name: base + k for k, name in enumerate(self._owned_names)})
        return torch.tensor([place[name] for name in self.names], dtype=torch.int64)

    def window_shape(self, step_len: int) -> tuple[int, int]:
        if step_len == 1 and self._num_fields is not None:
            return self._num_steps, self._num_fields
        return step_len, len(self.names)

    def gather(
        self, date: Tensor, instrument: Tensor, step_len: int = 1, fill: str = "none"
    ) -> Tensor:
        """`[B, num_steps, F]` windows of whole fields for `step_len` 1.

        Where single columns were taken out or added, and for a longer `step_len`, each step
        holds the flat columns: `[B, step_len, len(names)]`.
        """
        check_fill(fill)
        if step_len == 1 and self._num_fields is not None:
            x = self._windows(date, instrument)[..., : self._num_fields]
            if self._owned_names:
                x = self._overwritten(x, date, instrument)
            return self._grid(x)
        rows = self.history.rows(date, instrument, step_len, fill)
        at = rows.clamp(min=0).reshape(-1)
        who = instrument[:, None].expand(-1, step_len).reshape(-1)
        x = self._windows(at, who).transpose(1, 2).flatten(1)
        if self._owned_names:
            x = torch.cat([x, self._owned[who, at]], 1)
        x = self.fused(x.index_select(1, self._columns)).view(*rows.shape, -1)
        return x.masked_fill_((rows < 0)[..., None], NAN)

    def _windows(self, date: Tensor, instrument: Tensor) -> Tensor:
        """`[B, num_steps, K]`, normalised by the last step."""
        rows, k = self.values.shape[1:]
        steps = self._num_steps
        count = self._flat.shape[0] - steps + 1
        overlapping = self._flat.as_strided((count, steps * k), (k, 1), self._flat.storage_offset())
        x = overlapping.index_select(0, instrument * rows + date).view(-1, steps, k)
        today = x[:, -1].index_select(1, self._today).add_(self._add)
        return x.div_(today[:, None])

    def _overwritten(self, x: Tensor, date: Tensor, instrument: Tensor) -> Tensor:
        place = {name: k for k, name in enumerate(self.names)}
        at = torch.tensor([place[name] for name in self._owned_names], device=x.device)
        x = x.contiguous()
        x[:, at % self._num_steps, at // self._num_steps] = self._owned[instrument, date]
        return x

    def to(self, device: torch.device) -> Packed:
        return WindowPacked(
            self.values.to(device),
            self.fields,
            self.names,
            num_steps=self._num_steps,
            num_fields=self._num_fields,
            owned=(self._owned_names, self._owned.to(device)),
            fused=self.fused.to(device),
            history=self.history.exists,
        )

    @property
    def num_bytes(self) -> int:
        return 4 * (self.values.numel() + self._owned.numel())

    def infinite(self) -> Tensor:
        found = torch.zeros(len(self.names), dtype=torch.bool, device=self.device)
        price = self.values[:, :, self.fields.index(PRICE)]
        if not bool(self.values.isinf().any() | (price == 0).any() | self._owned.isinf().any()):
            return found
        exists = self.history.exists
        n = self.values.shape[0]
        dates = torch.arange(self._dates, device=self.device)
        for who in range(n):
            at = dates[exists[:, who]]
            x = self.gather_flat(at, torch.full_like(at, who))
            found |= x.isinf().any(0)
        return found

    def gather_flat(self, date: Tensor, instrument: Tensor) -> Tensor:
        """`[B, len(names)]`: the columns of one row, in the order of the names."""
        x = self._windows(date, instrument).transpose(1, 2).flatten(1)
        if self._owned_names:
            x = torch.cat([x, self._owned[instrument, date]], 1)
        return self.fused(x.index_select(1, self._columns))


def _normaliser(field: str) -> str:
    return VOLUME if field == VOLUME else PRICE
