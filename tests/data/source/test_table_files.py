"""TableSource: files as vendors and programs write them, read without a mapping."""

from __future__ import annotations

import decimal
import gzip
import io
import logging

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from qtorch.core.errors import ConfigError, DataError
from qtorch.data.source.frame import FrameSource
from qtorch.data.source.table import TableSource

ROWS = "date,symbol,close\n2020-01-02,000001,1.5\n2020-01-03,000001,2.5\n"
YAHOO = (
    "Date,Open,High,Low,Close,Adj Close,Volume\n"
    "2020-01-02,10,12,8,11,5.5,100\n"
    "2020-01-03,20,24,16,20,20,100\n"
)
YFINANCE = (
    "Price,Close,High,Low,Open,Volume\nTicker,{0},{0},{0},{0},{0}\nDate,,,,,\n"
    "2020-01-02,1,2,0.5,1,10\n2020-01-03,1,2,0.5,1,10\n"
)


def values(source) -> dict[str, list[float]]:
    return source.panel().to_frame().to_dict("list")


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("a.csv", "\ufeff" + ROWS, {}),
        ("a.csv", ROWS.encode("utf-16"), {}),
        ("a.csv", gzip.compress(ROWS.encode()), {}),
        ("a.csv.gz", gzip.compress(ROWS.encode()), {}),
        ("A.CSV", ROWS.replace("\n", "\r\n"), {}),
        ("a.csv", ROWS.replace(",", ";"), {}),
        ("a.csv", ROWS.replace(",", ";").replace(".", ","), {"decimal": ","}),
        ("a.csv", "sep=;\n" + ROWS.replace(",", ";"), {}),
        ("a.csv", ROWS.replace(",", "|"), {}),
        ("a.tsv", ROWS.replace(",", "\t"), {}),
        ("a.csv", ROWS.replace(",", " , "), {}),
        ("a.csv", ROWS.replace("000001", '="000001"'), {}),
        ("a.csv", ROWS.replace("date,symbol,close", "TRADE_DATE,Ts Code,$Close"), {}),
        ("a.csv", ROWS.replace("date,symbol,close", "日期,股票代码,收盘"), {}),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 10 else "",
)
def test_csv_files_of_many_kinds(tmp_path, name, content, options):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    source = TableSource(path, **options)
    assert source.stored_instruments() == ["000001"]
    assert values(source) == {"close": [1.5, 2.5]}
    assert list(source.calendar()) == [pd.Timestamp("2020-01-02"), pd.Timestamp("2020-01-03")]


def test_the_row_numbers_of_to_csv_are_no_field(tmp_path):
    frame = pd.DataFrame({"date": pd.bdate_range("2020", periods=2), "symbol": "A", "close": 1.0})
    frame.to_csv(tmp_path / "a.csv")
    assert TableSource(tmp_path / "a.csv").fields() == ("close",)
    (tmp_path / "one").mkdir()
    frame.set_index("date").drop(columns="symbol").rename_axis(None).to_csv(tmp_path / "one/B.csv")
    assert TableSource(tmp_path / "one").stored_instruments() == ["B"]


def test_problems_of_csv_files_are_one_line(tmp_path):
    path = tmp_path / "a.csv"
    for content, message in {
        ROWS.replace(",", ";").replace(".", ",").encode(): r"'close' \('1,5' at .*decimal=",
        ROWS.replace("1.5", "-").encode(): r"'close' \('-' at 2020-01-02",
        ROWS.replace("000001", "股票").encode("gbk"): "is not text in UTF-8",
        b"date,symbol,close\n": "has no rows",
        b"": "cannot be read as a table",
    }.items():
        path.write_bytes(content)
        with pytest.raises(DataError, match=message) as error:
            TableSource(path).panel()
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


# -- dates ---------------------------------------------------------------------------------------


def test_files_of_one_folder_share_the_order_of_day_and_month(tmp_path):
    (tmp_path / "A.csv").write_text("date,close\n01/02/2020,1\n03/02/2020,2\n")
    with pytest.raises(DataError, match=r"A.csv, column 'date': the dates 01/02/2020, 03/02/2020"):
        TableSource(tmp_path).panel()
    (tmp_path / "B.csv").write_text("date,close\n03/02/2020,1\n14/02/2020,2\n")
    days = ["2020-02-01", "2020-02-03", "2020-02-14"]
    assert list(TableSource(tmp_path).calendar()) == list(pd.to_datetime(days))
    (tmp_path / "B.csv").unlink()
    source = TableSource(tmp_path, date_format="%m/%d/%Y")
    assert list(source.calendar()) == list(pd.to_datetime(["2020-01-02", "2020-03-02"]))


def test_time_zones_and_counts_by_option(tmp_path):
    path = tmp_path / "a.parquet"
    sessions = pd.DatetimeIndex(["2020-01-02 05:00", "2020-07-02 04:00"]).tz_localize("UTC")
    frame = pd.DataFrame({"Date": sessions, "symbol": "A", "close": 1.0})
    frame.to_parquet(path)
    with pytest.raises(DataError, match=r"'Date': the dates have the time zone UTC.*timezone="):
        TableSource(path).panel()
    expected = list(pd.to_datetime(["2020-01-02", "2020-07-02"]))
    assert list(TableSource(path, timezone="America/New_York").calendar()) == expected
    frame.assign(Date=sessions.as_unit("ms").asi8).to_parquet(path)
    source = TableSource(path, timezone="America/New_York", date_format="ms")
    assert list(source.calendar()) == expected
    frame.assign(Date=[20200102, 20200702]).to_parquet(path)
    assert list(TableSource(path).calendar()) == expected


# -- parquet -------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [["symbol"], ["date"], ["market", "year", "symbol"]])
def test_hive_partitions(tmp_path, keys):
    days = pd.bdate_range("2020-01-01", periods=2)
    frame = pd.DataFrame({"date": days.repeat(2), "symbol": ["000001", "NA"] * 2, "close": 1.0})
    frame.assign(market="us", year=2020).drop(
        columns=[c for c in ("market", "year") if c not in keys], errors="ignore"
    ).to_parquet(tmp_path, partition_cols=keys)
    (tmp_path / "_SUCCESS").write_text("")
    (tmp_path / "_delta_log").mkdir()
    (tmp_path / "_delta_log" / "0.parquet").write_text("not a table")
    (tmp_path / ".hidden.parquet").write_text("not a table")
    source = TableSource(tmp_path)
    assert source.stored_instruments() == ["000001", "NA"]
    assert source.fields() == ("close",)
    assert list(source.calendar()) == list(days)


def test_a_partition_without_a_name_is_refused(tmp_path):
    folder = tmp_path / "symbol=__HIVE_DEFAULT_PARTITION__"
    folder.mkdir()
    pd.DataFrame({"date": ["2020-01-02"], "close": [1.0]}).to_parquet(folder / "a.parquet")
    with pytest.raises(DataError, match="some rows have no instrument in 'symbol'"):
        TableSource(tmp_path).panel()


def test_decimal_prices_and_names_of_other_types(tmp_path):
    prices = pa.array([decimal.Decimal("1.5"), None], pa.decimal128(10, 2))
    days = pd.bdate_range("2020-01-01", periods=2)
    table = pa.table({"date": days, "symbol": [600519.0, 600519.0], "close": prices})
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    source = TableSource(tmp_path / "a.parquet")
    assert source.stored_instruments() == ["600519"]
    np.testing.assert_array_equal(values(source)["close"], [1.5, np.nan])
    binary = table.set_column(1, "symbol", pa.array([b"000001"] * 2, pa.binary()))
    pa.parquet.write_table(binary, tmp_path / "a.parquet")
    assert TableSource(tmp_path / "a.parquet").stored_instruments() == ["000001"]
    truth = table.set_column(1, "symbol", pa.array([True, True]))
    pa.parquet.write_table(truth, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="the name True is a truth value; read names as text"):
        TableSource(tmp_path / "a.parquet").panel()


# -- the usual spellings ---------------------------------------------------------------------------


def test_a_folder_with_a_file_per_ticker(tmp_path, caplog):
    for name in ("KO", "TRUE", "LOW"):
        (tmp_path / f"{name}.csv").write_text(YAHOO)
    with caplog.at_level(logging.INFO):
        source = TableSource(tmp_path)
        assert source.stored_instruments() == ["KO", "LOW", "TRUE"]
    assert source.fields() == ("open", "high", "low", "close", "adj_close", "volume")
    lines = [r.message for r in caplog.records if "columns of" in r.message]
    assert len(lines) == 1
    assert "Date as datetime, Open as open" in lines[0]


def test_yfinance_writes_two_lines_of_header(tmp_path):
    for name in ("NA", "KO"):
        (tmp_path / f"{name}.csv").write_text(YFINANCE.format(name))
    for layout in ("auto", "long", "per_instrument"):
        source = TableSource(tmp_path, layout=layout)
        assert source.stored_instruments() == ["KO", "NA"]
    assert source.fields() == ("close", "high", "low", "open", "volume")
    (tmp_path / "KO.csv").unlink()
    (tmp_path / "NA.csv").write_text(
        "Price,Close,Close,Volume,Volume\nTicker,TRUE,NA,TRUE,NA\nDate,,,,\n"
        "2020-01-02,1,2,5,6\n2020-01-03,3,,7,\n"
    )
    source = TableSource(tmp_path)
    assert source.load(["close"], instruments=["TRUE"]).values.flatten().tolist() == [1, 3]
    assert source.load(["close"], instruments=["NA"]).spans.tolist() == [[0, 0]]


def test_a_file_without_events_had_none(tmp_path):
    for name, column in (("A", ""), ("B", ",Capital Gains")):
        cell = ",0.5" if column else ""
        (tmp_path / f"{name}.csv").write_text(f"Date,Close{column}\n2020-01-02,1{cell}\n")
    source = TableSource(tmp_path)
    assert source.fields() == ("close", "capital_gains")
    assert source.load(["capital_gains"]).values.flatten().tolist() == [0, 0.5]


def test_the_layout_of_a_folder(tmp_path):
    wide, mixed = tmp_path / "wide", tmp_path / "mixed"
    wide.mkdir()
    mixed.mkdir()
    for field in ("open", "Close"):
        (wide / f"{field}.csv").write_text("Date,000001,TIME\n2020-01-02,1,2\n")
    source = TableSource(wide)
    assert source.fields() == ("close", "open")
    assert source.stored_instruments() == ["000001", "TIME"]
    single = tmp_path / "single"
    single.mkdir()
    (single / "LOW.csv").write_text(YAHOO)  # an instrument, not a field
    source = TableSource(single)
    assert source.stored_instruments() == ["LOW"]
    (single / "LOW.csv").rename(single / "pe.csv")
    (single / "pe.csv").write_text("Date,000001,TIME\n2020-01-02,1,2\n")
    with pytest.raises(DataError, match="layout='per_instrument' if its columns are fields, or"):
        TableSource(single).panel()
    assert TableSource(single, layout="wide").fields() == ("pe",)
    (mixed / "A.csv").write_text("date,close\n2020-01-02,1\n")
    (mixed / "B.csv").write_text("date,symbol,close\n2020-01-02,B,1\n")
    with pytest.raises(DataError, match=r"A.csv has no column for the instrument, but other"):
        TableSource(mixed).panel()


def test_a_name_as_written_comes_first(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("Date,date,symbol,Close,close\nx,2020-01-02,A,1,2\n")
    source = TableSource(path, columns={"close": "close"})
    assert values(source) == {"close": [2.0]}
    path.write_text("date,symbol,Close,close,Net Income,PE\n2020-01-02,A,1,2,3,4\n")
    assert TableSource(path).fields() == ("Close", "close", "net_income", "PE")


# -- adjusted prices -------------------------------------------------------------------------------


@pytest.mark.parametrize("adjust", ["Adj Close", "adj_close"])
def test_adjusting_scales_all_prices(tmp_path, adjust):
    (tmp_path / "A.csv").write_text(YAHOO)
    source = TableSource(tmp_path, adjust=adjust)
    assert values(source) == {
        "open": [5, 20],
        "high": [6, 24],
        "low": [4, 16],
        "close": [5.5, 20],
        "volume": [200, 100],  # close x volume is the traded money, as before
        "factor": [0.5, 1],
    }
    assert source.fingerprint() != TableSource(tmp_path).fingerprint()


def test_a_frame_is_adjusted_like_its_table(tmp_path):
    (tmp_path / "A.csv").write_text(YAHOO)
    frame = pd.read_csv(tmp_path / "A.csv").assign(ticker="A")
    source = FrameSource(frame, adjust="Adj Close")
    table = TableSource(tmp_path, adjust="Adj Close")
    assert source.panel().fingerprint() == table.panel().fingerprint()
    with pytest.raises(DataError, match=r"unknown column for adjust 'Adjusted'"):
        FrameSource(frame, adjust="Adjusted")
    with pytest.raises(ConfigError, match=r"adjust='Adj Close' needs a DataFrame"):
        FrameSource(source.panel(), adjust="Adj Close")


@pytest.mark.parametrize("layout", ["per_instrument", "wide", "frame"])
def test_raw_prices_beside_an_adjusted_close_are_one_warning(tmp_path, caplog, layout):
    (tmp_path / "A.csv").write_text(YAHOO)
    frame = pd.read_csv(tmp_path / "A.csv")
    if layout == "frame":
        FrameSource(frame.assign(ticker="A"))
    else:
        if layout == "wide":
            for field in ("Close", "Adj Close"):
                wide = frame[["Date", field]].set_axis(["Date", "A"], axis=1)
                wide.to_csv(tmp_path / f"{field}.csv", index=False)
            (tmp_path / "A.csv").unlink()
        TableSource(tmp_path, layout=layout).panel()
    (warning,) = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert "the prices are raw, so splits and dividends look like returns" in warning
    assert "data.adjust=\"Adj Close\" (in Python adjust='Adj Close'" in warning


def test_an_adjusted_close_that_equals_the_close_is_no_warning(tmp_path, caplog):
    frame = pd.read_csv(io.StringIO(YAHOO)).assign(ticker="A")
    FrameSource(frame.assign(Close=frame["Adj Close"]).drop(columns=["Open", "High", "Low"]))
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_adjusting_needs_the_raw_and_the_adjusted_close(tmp_path):
    (tmp_path / "A.csv").write_text(YAHOO)
    with pytest.raises(DataError, match=r"unknown column for adjust 'Adjusted'"):
        TableSource(tmp_path, adjust="Adjusted").panel()
    with pytest.raises(DataError, match="needs the raw close beside the adjusted one"):
        TableSource(tmp_path, adjust="Adj Close", columns={"close": "Adj Close"}).panel()


def test_a_mixture_of_adjusted_and_raw_prices_is_a_warning(tmp_path, caplog):
    (tmp_path / "A.csv").write_text(YAHOO)
    columns = {"open": "Open", "high": "High", "low": "Low", "close": "Adj Close"}
    TableSource(tmp_path, columns=columns).panel()
    warnings = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "the close is the adjusted 'Adj Close', but Open, High, Low are raw" in warnings[0]
    caplog.clear()
    bars = {"low": [8.0] * 20, "high": [12.0] * 20, "close": [5.0] * 2 + [11.0] * 18}
    days = pd.bdate_range("2020-01-01", periods=20)
    frame = pd.DataFrame({"date": days, "symbol": "A", **bars})
    FrameSource(frame)
    assert "the close is outside low..high in 10% of the bars" in caplog.text
    caplog.clear()
    FrameSource(frame.assign(close=11.0))
    TableSource(tmp_path, adjust="Adj Close").panel()
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
