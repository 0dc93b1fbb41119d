"""Small markets shared by the tests of the data sources."""

from __future__ import annotations

import pandas as pd
import pytest

from qtorch.data.source.qlib import QlibSource
from qtorch.data.source.synthetic import SyntheticSource
from qtorch.data.source.writer import write_qlib


@pytest.fixture(scope="session")
def market() -> SyntheticSource:
    """Forty stocks over two years, with late listings, delistings and suspensions."""
    return SyntheticSource(40, "2018-01-01", "2019-12-31", seed=3)


@pytest.fixture(scope="session")
def qlib_folder(market, tmp_path_factory):
    """The market in Qlib's layout; tests must not change it."""
    return write_qlib(market, tmp_path_factory.mktemp("qlib") / "market")


@pytest.fixture
def writable_folder(market, tmp_path):
    """A small market in Qlib's layout that a test may change."""
    panel = market.load(["open", "close", "volume"], instruments=["S00", "S01", "S02"])
    return write_qlib(panel, tmp_path / "market")


@pytest.fixture(scope="session")
def qlib_source(qlib_folder) -> QlibSource:
    """The source that reads `qlib_folder`."""
    return QlibSource(qlib_folder)


@pytest.fixture(scope="session")
def long_frame(market) -> pd.DataFrame:
    """Six stocks of the market with one row per bar, sorted by instrument."""
    names = ["S00", "S01", "S02", "S03", "S04", "S05"]
    frame = market.load(["open", "close", "volume"], instruments=names).to_frame()
    frame = frame.dropna().reset_index()
    return frame.sort_values(["instrument", "datetime"], ignore_index=True)
