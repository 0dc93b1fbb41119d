"""The positions of a backtest by date, read as Qlib's scripts read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

import pandas as pd
import torch

from qtorch.core.dates import as_stamp
from qtorch.core.errors import ConfigError, LoadObjectError, check_name
from qtorch.core.serial import State
from qtorch.core.trust import trust_subclasses

CASH, DELAYED_CASH, ACCOUNT = "cash", "cash_delay", "now_account_value"
DAY = "day"
COLUMNS, MONEY = ("amount", "price", "count", "weight"), ("cash", "account", "value")
FORMAT = 1  # of the stored positions
_ROUNDING = 1e-9  # of the account: less is no delayed cash


class Position:
    """The portfolio at the end of one bar. Corresponds to Qlib's Position, for reading only.

    `position` is `{instrument: {"amount", "price", "weight", "count_day"}, "cash": money,
    "now_account_value": money}`: amounts in adjusted shares, the price of the last close, the
    weight as a fraction of the account, the number of bars held. With the executor's `settle_type:
    cash` it has "cash_delay" too, the proceeds of the bar's sales.
    """

    def __init__(
        self,
        cash: float = 0.0,
        position_dict: Mapping[str, Mapping[str, float] | float] | None = None,
    ) -> None:
        self.init_cash = cash
        self.position: dict[str, Any] = {
            name: {"amount": value} if isinstance(value, int | float) else dict(value)
            for name, value in (position_dict or {}).items()
        }
        self.position[CASH] = cash
        if all("price" in value for value in self._holdings().values()):
            self.position[ACCOUNT] = self.calculate_value()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.position})"

    def _holdings(self) -> dict[str, dict[str, float]]:
        return {name: value for name, value in self.position.items() if isinstance(value, dict)}

    def _holding(self, code: str) -> dict[str, float]:
        check_name("instrument of the position", code, self._holdings())
        holding: dict[str, float] = self.position[code]
        return holding

    def check_stock(self, stock_id: str) -> bool:
        """Whether the portfolio holds an instrument."""
        return stock_id in self._holdings()

    def get_stock_list(self) -> list[str]:
        """Return the instruments that are held."""
        return list(self._holdings())

    def get_stock_amount(self, code: str) -> float:
        """Return the adjusted shares of an instrument; 0 without a position."""
        return self._holdings().get(code, {}).get("amount", 0)

    def get_stock_price(self, code: str) -> float:
        """Return the last close of an instrument that is held."""
        return self._holding(code)["price"]

    def get_stock_count(self, code: str, bar: str) -> float:
        """Return for how many bars (`bar`: "day") an instrument has been held."""
        return self._holding(code).get(f"count_{bar}", 0)

    def get_stock_weight(self, code: str) -> float:
        """Return the value of an instrument that is held as a fraction of the account."""
        return self._holding(code)["weight"]

    def get_cash(self, include_settle: bool = False) -> float:
        """Return the cash; `include_settle` adds the proceeds of the bar's sales (settle_type)."""
        delayed: float = self.position.get(DELAYED_CASH, 0.0) if include_settle else 0.0
        cash: float = self.position[CASH]
        return cash + delayed

    def calculate_stock_value(self) -> float:
        """Return the value of all positions, in money."""
        return float(sum(h["amount"] * h["price"] for h in self._holdings().values()))

    def calculate_value(self) -> float:
        """Return the value of the account: positions and cash, in money."""
        return self.calculate_stock_value() + self.get_cash(include_settle=True)

    def get_stock_amount_dict(self) -> dict[str, float]:
        """Return `{instrument: adjusted shares}`."""
        return {name: holding["amount"] for name, holding in self._holdings().items()}

    def get_stock_weight_dict(self, only_stock: bool = False) -> dict[str, float]:
        """Return `{instrument: fraction of the account}`; `only_stock`: of the positions' value."""
        total = self.calculate_stock_value() if only_stock else self.calculate_value()
        return {n: h["amount"] * h["price"] / total for n, h in self._holdings().items()}


@trust_subclasses
class Positions(Mapping[pd.Timestamp, Position]):
    """The Position of each bar, by its time stamp. Corresponds to Qlib's `positions_normal`.

    `frame` are the positions of one member by (datetime, instrument), as of
    `BacktestResult.positions`; `report` has the cash and the account of all bars, as
    `BacktestResult.report` and `report_normal_1day.pkl`. Dates may be text. A run stores the object
    as `positions_normal_1day.pkl`, without pickle.
    """

    def __init__(self, frame: pd.DataFrame, report: pd.DataFrame) -> None:
        missing = set(COLUMNS) - set(frame.columns)
        if frame.index.nlevels != 2 or missing or not set(MONEY) <= set(report):
            raise ConfigError(
                "Positions needs the positions and the report of one member (result[name] of a "
                f"backtest with several): got columns {list(frame.columns)[:8]} by "
                f"{list(frame.index.names)}, and {list(report.columns)[:8]}."
            )
        self.frame = frame
        self._money = report[list(MONEY)]
        self._cash: pd.Series = report[CASH]
        delayed = report["account"] - report["value"] - report[CASH]
        self._delayed = delayed.where(delayed > _ROUNDING * report["account"], 0.0)
        levels = frame.index.names
        self._days: dict[Any, pd.DataFrame] = {
            stamp: day.droplevel(levels[0])
            for stamp, day in frame.rename(columns={"count": f"count_{DAY}"}).groupby(level=0)
        }

    def __getitem__(self, date: Any) -> Position:
        stamp = as_stamp(date)
        if stamp not in self._cash.index:
            raise KeyError(date)
        day = self._days.get(stamp)
        holdings: Any = {} if day is None else day.to_dict(orient="index")
        position = Position(float(self._cash[stamp]), holdings)
        if self._delayed[stamp]:
            position.position[DELAYED_CASH] = float(self._delayed[stamp])
            position.position[ACCOUNT] = position.calculate_value()
        return position

    def __iter__(self) -> Iterator[pd.Timestamp]:
        return iter(self._cash.index)

    def __len__(self) -> int:
        return len(self._cash)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} bars, {len(self.frame)} positions)"

    def to_state(self) -> State:
        """Return the positions and the money of all bars as names and tensors."""
        index: Any = self.frame.index
        bars = pd.DatetimeIndex(self._money.index)
        config = {
            "format": FORMAT,
            "instruments": [str(name) for name in index.levels[1]],
            "names": [str(name) for name in index.names],
            "unit": bars.unit,
        }
        tensors = {
            "bars": _stamps_tensor(bars),
            "datetime": _stamps_tensor(index.get_level_values(0)),
            "instrument": torch.tensor(index.codes[1].astype("int64")),
            **{name: torch.tensor(self.frame[name].to_numpy()) for name in COLUMNS},
            **{f"bar.{name}": torch.tensor(self._money[name].to_numpy()) for name in MONEY},
        }
        return State(config, tensors)

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Build the positions of a stored state; LoadObjectError for a newer format."""
        config = state.config
        if config["format"] > FORMAT:
            raise LoadObjectError(
                f"the positions were stored in format {config['format']} by a newer qtorch; this "
                f"one reads formats up to {FORMAT}. Update qtorch."
            )
        values = {name: tensor.numpy() for name, tensor in state.tensors.items()}
        stamps, bars = (
            pd.DatetimeIndex(values[name].view("datetime64[ns]")).as_unit(config["unit"])
            for name in ("datetime", "bars")
        )
        # Plain text: pandas refuses a subclass of str as the name of a level of dates.
        instruments = pd.Index([str(name) for name in config["instruments"]])
        names = [str(name) for name in config["names"]]
        index = pd.MultiIndex.from_arrays(
            [stamps, instruments.take(values["instrument"])], names=names
        )
        frame = pd.DataFrame({name: values[name] for name in COLUMNS}, index=index)
        money = {name: values[f"bar.{name}"] for name in MONEY}
        return cls(frame, pd.DataFrame(money, index=bars.rename(names[0])))


def _stamps_tensor(stamps: pd.Index) -> torch.Tensor:
    """Return time stamps as nanoseconds since 1970, `[K]` int64."""
    return torch.tensor(pd.DatetimeIndex(stamps).as_unit("ns").asi8)
