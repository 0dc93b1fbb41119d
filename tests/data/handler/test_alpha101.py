"""Alpha101: beside plain pandas, its groups, its universe, and what a value may see."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.errors import ConfigError
from qtorch.core.instantiate import init_instance_by_config
from qtorch.data import Alpha101, Alpha101DL, FrameSource
from qtorch.data.expression import evaluate
from qtorch.data.expression.requirement import max_reach
from qtorch.data.handler.alpha101 import alpha101
from qtorch.data.panel.panel import Panel
from tests.data.handler.alpha101_reference import alpha101_frames

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts" / "parity"))

from random_prices import random_prices

GROUP_FIELDS = {"sector": "sector", "industry": "industry"}
# Columns that rank numbers which are equal but for rounding errors, such as correlations of a few
# ranks: their ranks differ where numpy and the running sums round differently.
RANKS_OF_TIES = {
    *(13, 15, 16, 58, 59, 63, 66, 67, 68, 69, 71, 72, 76, 77, 78, 82, 85, 88, 89, 91, 92, 93),
    *(94, 95, 96, 97, 98, 99),
}


def random_market(num_dates: int, num_instruments: int, *, missing: float = 0.0) -> Panel:
    rng = np.random.default_rng(0)
    shape = (num_dates, num_instruments)
    fields = random_prices(rng, shape)
    industry = rng.integers(0, 3, num_instruments)
    for values in fields.values():
        values[rng.random(shape) < missing] = np.nan
    fields |= {"sector": np.tile(industry // 2, (num_dates, 1))}
    fields |= {
        "industry": np.tile(industry, (num_dates, 1)),
        "cap": 1e6 * fields["close"] * (1 + industry),
    }
    values = torch.from_numpy(np.stack([v.astype(np.float32) for v in fields.values()], 2))
    names = [f"I{k:02d}" for k in range(num_instruments)]
    mask = torch.from_numpy(rng.random(shape) < 0.9)
    dates = pd.bdate_range("2020-01-01", periods=num_dates)
    return Panel(values, dates, names, list(fields), mask=mask)


def evaluate_alphas(bars: Panel, **options) -> Panel:
    expressions, names = alpha101(**options)
    return evaluate(dict(zip(names, expressions, strict=True)), bars)


@pytest.mark.slow
@pytest.mark.parametrize(("num_dates", "missing"), [(270, 0.0), (60, 0.05)])
def test_values_equal_those_of_plain_pandas(num_dates, missing) -> None:
    bars = random_market(num_dates, 8, missing=missing)
    values = evaluate_alphas(bars, groups=GROUP_FIELDS, cap="$cap").values.double().numpy()

    def frame(array: torch.Tensor) -> pd.DataFrame:
        return pd.DataFrame(array.numpy(), bars.calendar, bars.instruments)

    frames = {f: frame(bars.column(f).double()) for f in bars.fields}
    groups = {name: frames[name] for name in GROUP_FIELDS}
    groups["subindustry"] = frames["industry"]  # the next coarser one
    expected = alpha101_frames(frames, frame(bars.mask), groups)
    for k, reference in enumerate(expected):
        result, number = values[:, :, k], reference.to_numpy()
        assert (np.isnan(result) == np.isnan(number)).all(), k + 1
        is_equal = np.isclose(result, number, rtol=1e-3, atol=2e-5, equal_nan=True)
        # In the small market two cells of 480 may differ by a tie of ranks.
        assert is_equal.mean() >= (0.85 if k + 1 in RANKS_OF_TIES else 0.995), k + 1


def test_some_columns_by_hand() -> None:
    bars = random_market(12, 6)
    panel = evaluate_alphas(bars)
    assert panel.fields == tuple(f"ALPHA{k:03d}" for k in range(1, 102))
    opens, highs, lows, closes, vwaps, volumes = (
        pd.DataFrame(bars.column(f).double().numpy())
        for f in ("open", "high", "low", "close", "vwap", "volume")
    )
    members = pd.DataFrame(bars.mask.numpy())
    expected = {
        12: -np.sign(volumes.diff()) * closes.diff(),
        33: (opens / closes - 1).where(members).rank(axis=1, pct=True),
        41: (highs * lows) ** 0.5 - vwaps,
        42: (vwaps - closes).where(members).rank(axis=1)
        / (vwaps + closes).where(members).rank(axis=1),
        101: (closes - opens) / (highs - lows + 0.001),
    }
    for number, values in expected.items():
        result = panel.column(f"ALPHA{number:03d}").double().numpy()
        np.testing.assert_allclose(result, values, rtol=1e-4, atol=1e-5, err_msg=str(number))


def test_nothing_after_a_day_matters() -> None:
    assert max_reach(alpha101()[0]) == (251, 0)
    bars = random_market(16, 6)
    expressions = alpha101()[0][::6]
    changed = Panel(
        torch.cat([bars.values[:12], bars.values[12:] * 1.5]),
        bars.calendar,
        bars.instruments,
        bars.fields,
        mask=torch.cat([bars.mask[:12], ~bars.mask[12:]]),
    )
    before, after = (evaluate(expressions, b).values for b in (bars, changed))
    torch.testing.assert_close(after[:12], before[:12], rtol=0, atol=0, equal_nan=True)


def test_groups_of_the_source_are_found_and_said(caplog) -> None:
    bars = random_market(30, 8)
    columns = ["ALPHA048", "ALPHA058", "ALPHA100"]
    source = FrameSource(bars)
    with caplog.at_level(logging.INFO, logger="qtorch"):
        frame = Alpha101DL(columns=columns, source=source).load()
    assert "neutralised by sector, industry" in caplog.text
    fields = dict(zip(*reversed(alpha101(groups=GROUP_FIELDS)), strict=True))
    expected = source.features("all", [fields[c] for c in columns]).swaplevel().sort_index()
    np.testing.assert_array_equal(frame.to_numpy(), expected.to_numpy())
    assert "CSDemean($vwap, $sector)" in fields["ALPHA058"]
    assert ", $industry)" in fields["ALPHA048"]  # the nearest one to subindustry
    caplog.clear()
    prices = FrameSource(bars.select(fields=["open", "high", "low", "close", "vwap", "volume"]))
    with caplog.at_level(logging.INFO, logger="qtorch"):
        whole = Alpha101DL(columns=columns, source=prices).load()
    assert "neutralised over the whole universe" in caplog.text
    assert not np.allclose(whole, frame, equal_nan=True)
    with pytest.raises(ConfigError, match="classification"):
        alpha101(groups={"country": "country"})


def test_handler_and_its_options() -> None:
    source = FrameSource(random_market(30, 8))
    config = {
        "class": "Alpha101",
        "kwargs": {"columns": ["ALPHA101", "ALPHA056"], "source": source},
    }
    handler = init_instance_by_config(config, "qtorch.data")
    assert isinstance(handler, Alpha101)
    assert handler.get_cols("feature") == ["ALPHA056", "ALPHA101"]
    assert handler.get_cols("label") == ["LABEL0"]
    with_cap = Alpha101(columns=["ALPHA056"], cap="$cap", source=source).fetch(col_set="feature")
    assert not np.allclose(with_cap, handler.fetch(col_set="feature")[["ALPHA056"]], equal_nan=True)
    # Bars of an hour, without a vwap.
    bars = random_market(30, 8)
    hours = pd.date_range("2024-01-02 09:00", periods=30, freq="60min")
    bars = Panel(bars.values, hours, bars.instruments, bars.fields, mask=bars.mask)
    prices = FrameSource(bars.select(fields=["open", "high", "low", "close", "volume"]))
    hourly = Alpha101(columns=["ALPHA041", "ALPHA101"], vwap="(high+low)/2", source=prices)
    assert hourly.frequency() == "60min"
    values = hourly.fetch(col_set="feature")
    expected = prices.features("all", ["($high*$low)**0.5-($high+$low)/2"]).swaplevel().sort_index()
    np.testing.assert_allclose(values["ALPHA041"], expected.iloc[:, 0], rtol=1e-4, atol=1e-5)
    unknown = Alpha101(columns=["ALPHA041"], source=prices).fetch(col_set="feature")
    assert unknown.isna().all(axis=None)
    with pytest.raises(ConfigError, match="ALPHA102"):
        Alpha101(columns=["ALPHA102"])
