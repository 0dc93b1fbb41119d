from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from qtorch.core.tables import MISSING_VALUES, read_csv
from qtorch.data import Concepts, StaticDataLoader, TableSource

# Names that pandas reads as missing values, numbers or booleans unless it is told otherwise.
ODD_NAMES = sorted({*MISSING_VALUES, "000001", "1e5", "600000", "True", "inf"} - {""})


@pytest.fixture
def table() -> pd.DataFrame:
    dates = pd.to_datetime(["2020-01-02", "2020-01-03"])
    index = pd.MultiIndex.from_product([dates, ODD_NAMES], names=["datetime", "instrument"])
    return pd.DataFrame({"close": np.arange(len(index), dtype=np.float32)}, index=index)


def test_names_stay_text_and_other_columns_are_numbers(tmp_path):
    path = tmp_path / "table.csv"
    rows = "\n".join(f"{name},{value}" for name, value in zip(ODD_NAMES, "1" * 99, strict=False))
    path.write_text(f"symbol,code\n{rows}\n,NA\n")
    for column in ("symbol", 0, ("instrument", "symbol", "code")):
        frame = read_csv(path, [column])
        assert list(frame["symbol"][:-1]) == ODD_NAMES
        assert frame.iloc[-1].isna().all()
        assert frame["code"].sum() == len(ODD_NAMES)


def test_missing_values_are_those_of_pandas(tmp_path):
    path = tmp_path / "table.csv"
    words = ["1", *MISSING_VALUES, "2"]
    path.write_text("instrument,close\n" + "".join(f"A,{word}\n" for word in words))
    frame = read_csv(path, ["instrument", "no such column"])
    assert frame["close"].isna().tolist() == [False, *[True] * len(MISSING_VALUES), False]
    pd.testing.assert_frame_equal(frame, pd.read_csv(path))


def test_every_reader_keeps_odd_names(tmp_path, table):
    path = tmp_path / "bars.csv"
    table.to_csv(path)
    expected = set(ODD_NAMES)
    assert set(TableSource(path).load().instruments) == expected
    frame = StaticDataLoader(str(path)).load()
    assert set(frame.index.get_level_values("instrument")) == expected
    renamed = tmp_path / "renamed.csv"
    table.reset_index().rename(columns={"instrument": "asset"}).to_csv(renamed, index=False)
    source = TableSource(renamed, columns={"instrument": "asset"})
    assert set(source.load().instruments) == expected


def test_universes_and_concepts_keep_odd_names(tmp_path, table):
    path = tmp_path / "bars.csv"
    table.to_csv(path)
    members = tmp_path / "members.csv"
    members.write_text("universe,instrument\nNA,NULL\nNA,000001\n")
    source = TableSource(path, universes=members)
    assert source.universes() == ("NA", "all")
    assert set(source.instruments("NA")) == {"NULL", "000001"}
    concepts = tmp_path / "concepts.csv"
    concepts.write_text("instrument,concept,start\nNA,null,\n000001,007,2020-01-03\n")
    names = pd.Index(["000001", "NA"])
    bound = Concepts(concepts).bind(source.calendar(), names)
    assert bound.names == ("007", "null")
    assert bound.spans[:, :, 0].max() == 1


def test_per_instrument_files_and_wide_columns_keep_odd_names(tmp_path, table):
    (tmp_path / "files").mkdir()
    (tmp_path / "wide").mkdir()
    names = [name for name in ODD_NAMES if "/" not in name]
    for name in names:
        bars = table.xs(name, level="instrument").reset_index()
        bars.to_csv(tmp_path / "files" / f"{name}.csv", index=False)
    table["close"].unstack().to_csv(tmp_path / "wide" / "close.csv")
    files = TableSource(tmp_path / "files", layout="per_instrument")
    assert set(files.load().instruments) == set(names)
    wide = TableSource(tmp_path / "wide", layout="wide")
    assert set(wide.load().instruments) == set(ODD_NAMES)
