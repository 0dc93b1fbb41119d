"""Every way in keeps names as text, and reads dates by the same rule."""

from __future__ import annotations

import datetime
import logging

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from qtorch.backtest.run import benchmark_returns
from qtorch.backtest.scores import score_frame
from qtorch.core.errors import ConfigError, DataError
from qtorch.core.tables import read_indexed_table, read_table
from qtorch.data import (
    Concepts,
    DataHandlerLP,
    FrameSource,
    QlibSource,
    StaticDataLoader,
    TableSource,
)
from qtorch.data.describe import describe
from qtorch.data.handler.alpha import market_features
from qtorch.data.source.writer import write_qlib

NAMES = ["000001", "1E5", "INF", "NA", "NaN", "None", "TRUE", "false", "null"]
DAYS = ["2020-01-02", "2020-01-13"]


def long_table(dates=DAYS, column="close") -> pd.DataFrame:
    rows = [(date, name, 1.0) for date in dates for name in NAMES]
    return pd.DataFrame(rows, columns=["date", "ticker", column])


def read_source(source) -> tuple[list[str], list[str]]:
    return source.stored_instruments(), [f"{day:%Y-%m-%d}" for day in source.calendar()]


def read_index(frame) -> tuple[list[str], list[str]]:
    days = frame.index.get_level_values("datetime").unique()
    names = frame.index.get_level_values("instrument").unique()
    return sorted(names), [f"{day:%Y-%m-%d}" for day in sorted(days)]


def long_csv(table, folder):
    table.to_csv(folder / "bars.csv", index=False)
    return read_source(TableSource(folder / "bars.csv"))


def csv_per_instrument(table, folder):
    for name, rows in table.groupby("ticker"):
        rows.drop(columns="ticker").to_csv(folder / f"{name}.csv", index=False)
    return read_source(TableSource(folder))


def parquet(table, folder):
    table.to_parquet(folder / "bars.parquet")
    return read_source(TableSource(folder / "bars.parquet"))


def flat_frame(table, folder):
    return read_source(FrameSource(table))


def frame_by_index(table, folder):
    return read_source(FrameSource(table.set_index(["ticker", "date"]).sort_index()))


def frame_of_another_library(table, folder):
    return read_source(FrameSource(pa.Table.from_pandas(table)))


def static_csv(table, folder):
    table.to_csv(folder / "features.csv", index=False)
    return read_index(StaticDataLoader({"feature": str(folder / "features.csv")}).load())


def static_frame(table, folder):
    return read_index(StaticDataLoader(pa.Table.from_pandas(table)).load())


def frame_of_features(table, folder):
    return read_index(DataHandlerLP.from_df(table, label="close").fetch(data_key="raw"))


def scores(table, folder):
    return read_index(score_frame(table.set_index(["date", "ticker"])["close"]))


READERS = [
    long_csv,
    csv_per_instrument,
    parquet,
    flat_frame,
    frame_by_index,
    frame_of_another_library,
    static_csv,
    static_frame,
    frame_of_features,
    scores,
]
parametrize_readers = pytest.mark.parametrize("reader", READERS)


@parametrize_readers
def test_names_are_text(reader, tmp_path):
    assert reader(long_table(), tmp_path) == (NAMES, DAYS)


@parametrize_readers
@pytest.mark.parametrize(
    "dates",
    [
        [20200102, 20200113],
        ["02/01/2020", "13/01/2020"],
        ["01/02/2020", "01/13/2020"],
        [datetime.date(2020, 1, 2), datetime.date(2020, 1, 13)],
    ],
)
def test_dates_have_one_reading(reader, dates, tmp_path):
    assert reader(long_table(dates), tmp_path) == (NAMES, DAYS)


@parametrize_readers
@pytest.mark.parametrize(
    ("dates", "message"),
    [
        (["02/01/2020", "03/01/2020"], "day/month or month/day.*date_format="),
        ([1577923200, 1578873600], "numbers, not dates"),
        ([0, 1], "numbers, not dates"),
        (["2020-01-02T05:00:00Z", "2020-01-03T05:00:00Z"], "time zone UTC.*timezone="),
    ],
)
def test_dates_without_a_reading_are_refused(reader, dates, message, tmp_path):
    with pytest.raises(DataError, match=message):
        reader(long_table(dates), tmp_path)


@pytest.mark.parametrize("kind", [FrameSource, StaticDataLoader])
def test_frames_take_the_options_of_dates(kind):
    frame = long_table(["02/01/2020", "03/01/2020"])
    data = kind(frame, date_format="%d/%m/%Y")
    days = ["2020-01-02", "2020-01-03"]
    read = read_source if kind is FrameSource else lambda loader: read_index(loader.load())
    assert read(data)[1] == days
    opening = pd.to_datetime(frame["date"], format="%d/%m/%Y") + pd.Timedelta(hours=5)
    data = kind(frame.assign(date=opening.dt.tz_localize("UTC")), timezone="America/New_York")
    assert read(data)[1] == days


def test_frames_that_are_not_pandas_are_named():
    class Frame:
        columns = ("datetime", "instrument", "close")

    for reader in (
        lambda: FrameSource(Frame()),
        lambda: StaticDataLoader(Frame()).load(),
        lambda: DataHandlerLP.from_df(Frame(), label="close"),
    ):
        with pytest.raises(DataError, match=r"expected a pandas DataFrame, got .*Frame; convert"):
            reader()


def test_a_frame_of_yfinance():
    columns = pd.MultiIndex.from_product([["Close", "Volume"], ["KO", "NA"]])
    columns.names = ["Price", "Ticker"]
    index = pd.DatetimeIndex(DAYS, name="Date")
    frame = pd.DataFrame([[1.0, 2, 3, 4], [5, np.nan, 7, np.nan]], index, columns)
    source = FrameSource(frame)
    assert source.fields() == ("close", "volume")
    assert source.load(["close"], instruments=["KO"]).values.flatten().tolist() == [1, 5]
    assert source.load(["close"], instruments=["NA"]).spans.tolist() == [[0, 0]]


@pytest.mark.parametrize("level_names", [[None, None], ["Price", "Ticker"], ["field", "symbol"]])
@pytest.mark.parametrize("index_name", ["Date", None])
@pytest.mark.parametrize("instruments", [["KO", "NA", "000001"], ["KO"]])
def test_columns_by_field_and_instrument(tmp_path, level_names, index_name, instruments):
    fields = ["Open", "Close"]
    columns = pd.MultiIndex.from_product([fields, instruments], names=level_names)
    numbers = np.arange(1.0, 1 + len(columns) * len(DAYS)).reshape(len(DAYS), -1)
    frame = pd.DataFrame(numbers, pd.DatetimeIndex(DAYS, name=index_name), columns)
    for table in (frame, frame.swaplevel(axis=1).sort_index(axis=1)):
        table.to_csv(tmp_path / "index.csv")
        table.to_csv(tmp_path / "semicolons.csv", sep=";")
        table.rename_axis("Date").reset_index().to_csv(tmp_path / "columns.csv", index=False)
        files = [TableSource(file) for file in sorted(tmp_path.glob("*.csv"))]
        for source in (*files, FrameSource(table)):
            assert source.fields() == ("open", "close") or source.fields() == ("close", "open")
            assert source.stored_instruments() == sorted(instruments)
            closes = source.load(["close"], instruments=["KO"]).values.flatten().tolist()
            assert closes == frame["Close", "KO"].tolist()


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ("date,KO,PEP\n2020-01-02,1,2\n2020-01-03,,\n", 2),
        ("ticker,close\nKO,1\nPEP,\n", 2),
        ("ticker,open,close\nKO,5,5\nPEP,5,5\n", 2),
        ("universe,instrument,start,end\nall,KO,2020-01-02,2020-01-02\nall,NA,,\n", 2),
        ("universe,instrument,start,end\n,KO,2020-01-02,2020-01-02\n", 1),
        ("ticker,date,close\nKO,2020-01-02,1\nKO,2020-01-03,\n", 2),
    ],
)
def test_one_line_of_header(tmp_path, content, rows):
    (tmp_path / "a.csv").write_text(content)
    table = read_table(tmp_path / "a.csv")
    assert list(table.columns) == content.split("\n")[0].split(",")
    assert len(table) == rows


def test_a_file_of_features_and_labels(tmp_path):
    index = pd.MultiIndex.from_product([pd.DatetimeIndex(DAYS), ["KO", "NA", "000001"]])
    columns = [("feature", "F1"), ("feature", "F2"), ("label", "L")]
    frame = pd.DataFrame(
        np.arange(3.0 * len(index)).reshape(-1, 3),
        index.set_names(["datetime", "instrument"]),
        pd.MultiIndex.from_tuples(columns),
    )
    frame.to_csv(tmp_path / "features.csv")
    read = StaticDataLoader(tmp_path / "features.csv").load()
    expected = StaticDataLoader(frame).load()
    assert list(read.columns) == columns
    pd.testing.assert_frame_equal(read, expected)
    with pytest.raises(DataError, match=r"features.csv: the columns have 2 levels .*'feature'"):
        TableSource(tmp_path / "features.csv").panel()


# -- names and spans of tables ---------------------------------------------------------------------


def test_concepts_and_members(tmp_path):
    members = tmp_path / "members.csv"
    rows = [f"{name},{name},02/01/2020,{end}" for name in NAMES for end in ("31/12/9999",)]
    members.write_text("Index,Ticker,From,To\n" + "\n".join(rows) + "\nNA,000001,15/01/2020,\n")
    long_table().to_csv(tmp_path / "bars.csv", index=False)
    source = TableSource(tmp_path / "bars.csv", universes=members)
    assert source.universes() == tuple(sorted([*NAMES, "all"]))
    assert source.instruments("TRUE") == {"TRUE": [tuple(map(pd.Timestamp, DAYS))]}
    concepts = tmp_path / "concepts.csv"
    concepts.write_text(members.read_text().replace("Index", "Industry"))
    bound = Concepts(concepts).bind(source.calendar(), pd.Index(NAMES))
    assert bound.names == tuple(NAMES)
    assert bound.spans[NAMES.index("TRUE"), 0].tolist()[1:] == [0, 1]
    concepts.write_text("instrument,concept,start\n000001,a,03/02/2020\n")
    with pytest.raises(DataError, match=r"concepts.csv, column 'start': .* date_format="):
        Concepts(concepts).bind(source.calendar(), pd.Index(NAMES))


def test_members_without_bars_and_broken_universes(tmp_path, caplog):
    long_table().to_csv(tmp_path / "bars.csv", index=False)
    (tmp_path / "members.csv").write_text("universe,instrument\nu,NA\nu,GONE\nbroken,GONE\n")
    # The file of members lies in the folder of the bars.
    source = TableSource(tmp_path, universes=tmp_path / "members.csv")
    assert set(source.instruments("u")) == {"NA"}
    assert "'u': 1 of 2 instruments have no bars and are left out: GONE" in caplog.text
    assert set(source.instruments("all")) == set(NAMES)
    with pytest.raises(DataError, match="universe 'broken': unknown instrument 'GONE'"):
        source.instruments("broken")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables_of_a_risk_model(tmp_path, suffix):
    path = tmp_path / f"factor_exp.{suffix}"
    table = pd.DataFrame({"instrument": NAMES, "size": np.arange(9.0)})
    table.to_csv(path, index=False) if suffix == "csv" else table.to_parquet(path)
    assert list(read_indexed_table(path).index) == NAMES
    if suffix == "parquet":
        table.set_index("instrument").to_parquet(path)
        assert list(read_indexed_table(path).index) == NAMES
        pd.DataFrame(np.eye(2)).to_parquet(path)  # a matrix without names
        assert read_indexed_table(path).shape == (2, 2)


def test_benchmarks():
    source = FrameSource(long_table())
    dates = source.calendar()
    returns = pd.Series([0.5, 0.25], index=[20200102, 20200113])
    assert benchmark_returns(returns, source, dates, "day").tolist() == [0.5, 0.25]
    assert benchmark_returns("TRUE", source, dates, "day").tolist() == [0.0, 0.0]
    for name in (float("nan"), True, 192, 1e5, [192]):
        with pytest.raises(ConfigError, match=r"is not text.*; write a name .* in quotes"):
            benchmark_returns(name, source, dates, "day")


def test_names_that_yaml_has_made_numbers():
    """Unquoted, YAML reads 000300 as 192, 1E5 as 100000.0 and TRUE as a truth value."""
    table = long_table().replace({"ticker": {"1E5": "600000"}})
    source = FrameSource(table, universes={"300": ["000001"]})
    assert len(benchmark_returns([600000], source, source.calendar(), "day")) == 2
    assert list(source.features([600000], ["$close"]).index.unique("instrument")) == ["600000"]
    assert len(source.instruments(300)) == 1
    number = r"the universe 192 is not text \(YAML reads 00300 .* as the octal number 192\); write"
    for universe in (192, 1e5, True, pd.Timestamp("2020-01-02"), [192], [True], {1e5: []}):
        with pytest.raises(ConfigError, match=number if universe == 192 else "not text.*quotes"):
            source.features(universe, ["$close"])
    with pytest.raises(DataError, match=r"universe 'octal': the instrument 192 is not text"):
        FrameSource(table, universes={"octal": [192]}).instruments("octal")
    with pytest.raises(ConfigError, match="the instrument of market 192 is not text"):
        market_features([192])


# -- the files of Qlib -----------------------------------------------------------------------------


@pytest.fixture
def qlib_folder(tmp_path):
    frame = long_table(pd.bdate_range("2020-01-01", periods=12)).replace({"ticker": {"false": "F"}})
    universes = {"two": ["000001", "NA"]}
    return write_qlib(FrameSource(frame), tmp_path / "qlib", universes=universes)


def test_universe_files_of_windows_and_open_ends(qlib_folder):
    path = qlib_folder / "instruments" / "two.txt"
    for content in (
        "\ufeff000001\t2020-01-01\t9999-12-31\r\nNA\t2020-01-01\t\r\n",
        "000001\t01/01/2020\t31/12/9999\nNA\t01/01/2020\n",
        "000001\t0001-01-01\t2020-12-31\n\nNA\t20200101\t99991231\textra\n",
    ):
        path.write_text(content, encoding="utf-8")
        frame = QlibSource(qlib_folder).features("two", ["$close"])
        assert sorted(frame.index.unique("instrument")) == ["000001", "NA"]
        assert len(frame) == 24
    path.write_text("000001\t01/02/2020\t02/03/2020\n")
    with pytest.raises(DataError, match=r"two.txt: the dates .*day/month or month/day"):
        QlibSource(qlib_folder).features("two", ["$close"])
    calendar = qlib_folder / "calendars" / "day.txt"
    calendar.write_text(calendar.read_text(), encoding="utf-8-sig")
    assert len(QlibSource(qlib_folder).calendar()) == 12


def test_a_broken_universe_breaks_no_other(qlib_folder, caplog):
    instruments = qlib_folder / "instruments"
    (instruments / "notes.txt").write_text("Copied from the old disk.\n")
    (instruments / "._all.txt").write_bytes(b"\x00\x05\x16\x07")
    (instruments / "folder.txt").mkdir()
    source = QlibSource(qlib_folder)
    assert source.universes() == ("all", "notes", "two")
    assert len(source.features("two", ["$close"])) == 24
    assert len(source.features(["NA"], ["$close"])) == 12  # a list looks into all universes
    with caplog.at_level(logging.WARNING):
        assert "two 2" in describe(source).text()
    assert "universe 'notes' cannot be read and is left out" in caplog.text
    with pytest.raises(DataError, match=r"notes.txt, line 1: expected tab-separated"):
        source.instruments("notes")
