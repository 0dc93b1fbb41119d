"""TableSource: layouts of parquet and CSV files, column mappings, and invalid tables."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from qtorch.core.errors import ConfigError, DataError
from qtorch.data.source import table as table_module
from qtorch.data.source.frame import FrameSource
from qtorch.data.source.qlib import QlibSource
from qtorch.data.source.table import TableSource


@pytest.fixture(scope="module")
def reference_panel(long_frame):
    return FrameSource(long_frame.set_index(["datetime", "instrument"])).load()


def assert_same(source, reference_panel):
    panel = source.load()
    assert sorted(panel.fields) == sorted(reference_panel.fields)
    assert list(panel.instruments) == list(reference_panel.instruments)
    assert panel.calendar.equals(reference_panel.calendar)
    assert torch.equal(panel.mask, reference_panel.mask)
    for field in reference_panel.fields:
        torch.testing.assert_close(
            panel.column(field), reference_panel.column(field), equal_nan=True, rtol=1e-6, atol=0
        )


# -- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["parquet", "csv", "csv.gz"])
def test_long_file(tmp_path, long_frame, reference_panel, suffix):
    path = tmp_path / f"bars.{suffix}"
    write = long_frame.to_parquet if suffix == "parquet" else long_frame.to_csv
    write(path, index=False)
    assert_same(TableSource(path), reference_panel)


@pytest.mark.parametrize("order", [["datetime", "instrument"], ["instrument", "datetime"]])
def test_a_stored_index_becomes_columns(tmp_path, long_frame, reference_panel, order):
    long_frame.set_index(order).sort_index().to_parquet(tmp_path / "bars.parquet")
    assert_same(TableSource(tmp_path / "bars.parquet"), reference_panel)


def test_folder_of_parts_in_any_order(tmp_path, long_frame, reference_panel):
    years = long_frame["datetime"].dt.year
    # The file of the later year comes first by name.
    long_frame[years == 2019].to_parquet(tmp_path / "a.parquet")
    (tmp_path / "deep").mkdir()
    long_frame[years == 2018].to_csv(tmp_path / "deep" / "b.csv", index=False)
    assert_same(TableSource(tmp_path), reference_panel)


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_one_file_per_instrument(tmp_path, long_frame, reference_panel, suffix):
    for name, bars in long_frame.groupby("instrument"):
        bars = bars.drop(columns="instrument").rename(columns={"datetime": "date"})
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "csv":
            bars.to_csv(path, index=False)
        else:
            bars.set_index("date").to_parquet(path)
    assert_same(TableSource(tmp_path, layout="per_instrument"), reference_panel)


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_one_file_per_field(tmp_path, long_frame, reference_panel, suffix):
    for field in ("open", "close", "volume"):
        wide = long_frame.pivot(index="datetime", columns="instrument", values=field)
        if suffix == "csv":
            wide.to_csv(tmp_path / f"{field}.csv")
        else:
            wide.rename_axis(index=None, columns=None).to_parquet(tmp_path / f"{field}.parquet")
    assert_same(TableSource(tmp_path, layout="wide"), reference_panel)
    price_source = TableSource(tmp_path, layout="wide", columns={"price": "close"})
    assert price_source.fields() == ("price",)
    with pytest.raises(DataError, match=r"unknown file of a field 'clos'.*'close'"):
        TableSource(tmp_path, layout="wide", columns={"price": "clos"}).load()


def test_instruments_with_a_dot_and_called_na(tmp_path):
    days = pd.bdate_range("2020-01-01", periods=3)
    for name in ("BRK.B", "NA"):
        frame = pd.DataFrame({"date": days, "close": [1.0, 2.0, 3.0]})
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
    source = TableSource(tmp_path, layout="per_instrument")
    assert list(source.load().instruments) == ["BRK.B", "NA"]
    long = pd.DataFrame({"date": days, "symbol": ["NA"] * 3, "close": ["1", "", "3"]})
    long.to_csv(tmp_path / "long.csv", index=False)
    panel = TableSource(tmp_path / "long.csv").load()
    assert list(panel.instruments) == ["NA"]
    assert panel.column("close")[:, 0].isnan().tolist() == [False, True, False]


# -- mapping -------------------------------------------------------------------------------------


def test_columns_are_renamed_by_the_mapping(tmp_path, long_frame):
    path = tmp_path / "bars.csv"
    table = long_frame.rename(columns={"datetime": "day", "instrument": "asset", "close": "adj"})
    table.assign(note="text").to_csv(path, index=False)
    columns = {"datetime": "day", "instrument": "asset", "close": "adj", "$volume": "volume"}
    source = TableSource(path, columns=columns)
    assert source.fields() == ("close", "volume")
    assert source.to_config()["columns"] == columns


def test_numeric_dates(tmp_path, long_frame, reference_panel):
    table = long_frame.assign(datetime=long_frame["datetime"].dt.strftime("%Y%m%d"))
    table.to_csv(tmp_path / "bars.csv", index=False)
    assert_same(TableSource(tmp_path / "bars.csv"), reference_panel)
    table.assign(datetime=range(len(table))).to_csv(tmp_path / "bars.csv", index=False)
    with pytest.raises(DataError, match="contains numbers, not dates"):
        TableSource(tmp_path / "bars.csv").load()
    table.assign(datetime=table["datetime"].where(table.index != 3)).to_csv(
        tmp_path / "bars.csv", index=False
    )
    with pytest.raises(DataError, match="some rows have no date in 'datetime'"):
        TableSource(tmp_path / "bars.csv").load()


def test_membership_file(tmp_path, long_frame):
    long_frame.to_parquet(tmp_path / "bars.parquet")
    (tmp_path / "members.csv").write_text(
        "universe,instrument,start,end\n"
        "two,S01,2018-01-01,2018-03-30\n"
        "two,S01,2019-01-01,\n"
        "two,S02,,\n"
    )
    source = TableSource(tmp_path / "bars.parquet", universes=tmp_path / "members.csv")
    assert source.universes() == ("all", "two")
    assert source.instruments("two")["S01"][1][1] == source.calendar()[-1]
    panel = source.load(instruments="two")
    days = panel.calendar[panel.mask[:, 0].numpy()]
    assert days[days < "2019"].max() == pd.Timestamp("2018-03-30")
    assert days.max() == panel.calendar[int(panel.spans[0, 1])]
    assert panel.mask[:, 1].sum() == panel.spans[1, 1] - panel.spans[1, 0] + 1
    with pytest.raises(DataError, match="no membership file"):
        TableSource(tmp_path / "bars.parquet", universes=tmp_path / "no.csv").load()


# -- invalid tables ------------------------------------------------------------------------------


def load_table(tmp_path, table, **options):
    table.to_parquet(tmp_path / "bars.parquet", index=False)
    return TableSource(tmp_path / "bars.parquet", **options).load()


def assert_data_error(tmp_path, table, match, **options):
    with pytest.raises(DataError, match=match) as error:
        load_table(tmp_path, table, **options)
    assert "\n" not in str(error.value)
    assert "bars.parquet" in str(error.value)


def test_duplicate_rows_raise(tmp_path, long_frame):
    duplicates = pd.concat([long_frame, long_frame.iloc[[5]]])
    rows = rf"row 6 of \S+bars.parquet and row {len(duplicates)} of \S+bars.parquet"
    assert_data_error(tmp_path, duplicates, rf"duplicate row \(2018-.*, 1 in all; .*{rows}")
    adjacent = long_frame.iloc[[*range(6), 5, *range(6, 60)]]
    assert_data_error(tmp_path, adjacent, r"duplicate row \(2018-.*row 6 of .* and row 7 of ")


def test_duplicate_rows_of_two_files_name_both(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text("date,symbol,close\n2020-01-02,A,1\n")
    with pytest.raises(DataError, match=r"row 1 of \S+a.csv and row 1 of \S+b.csv") as error:
        TableSource(tmp_path).load()
    assert "frame" not in str(error.value)


def test_sources_of_the_same_files_read_them_once(tmp_path, long_frame, monkeypatch):
    reads, read_table = [], table_module.read_table

    def count_read(path, *args, **options):
        reads.append(path)
        return read_table(path, *args, **options)

    monkeypatch.setattr(table_module, "read_table", count_read)
    first = load_table(tmp_path, long_frame)
    source = TableSource(tmp_path / "bars.parquet")
    assert source.knows_names
    assert source.load().fingerprint() == first.fingerprint()
    assert len(reads) == 1
    opens = TableSource(tmp_path / "bars.parquet", columns={"open": "open"})
    assert not opens.knows_names
    assert opens.fields() == ("open",)
    changed = load_table(tmp_path, long_frame.assign(close=1.0))
    assert len(reads) == 3
    assert changed.fingerprint() != first.fingerprint()


def test_rows_may_be_in_any_order(tmp_path, long_frame):
    sorted_panel = load_table(tmp_path, long_frame)
    newest_first = load_table(tmp_path, long_frame.iloc[::-1])
    shuffled = load_table(tmp_path, long_frame.sample(frac=1.0, random_state=0))
    for panel in (newest_first, shuffled):
        assert panel.fingerprint() == sorted_panel.fingerprint()


def test_wide_rows_may_be_in_any_order_but_not_twice(tmp_path):
    table = pd.DataFrame({"date": ["2020-01-03", "2020-01-02"], "A": [2.0, 1.0], "B": [4.0, 3.0]})
    table.to_csv(tmp_path / "close.csv", index=False)
    panel = TableSource(tmp_path, layout="wide").load()
    assert panel.column("close").tolist() == [[1.0, 3.0], [2.0, 4.0]]
    pd.concat([table, table.iloc[:1]]).to_csv(tmp_path / "close.csv", index=False)
    with pytest.raises(DataError, match=r"close.csv: the date 2020-01-03 has several rows"):
        TableSource(tmp_path, layout="wide").load()


def test_several_columns_of_one_name_raise(tmp_path):
    path = tmp_path / "bars.csv"
    path.write_text("date,symbol,close, close\n2020-01-02,A,1,2\n")
    with pytest.raises(DataError, match=r"several columns have the name 'close'; rename or remove"):
        TableSource(path).load()


def test_time_zones_raise(tmp_path, long_frame):
    utc_frame = long_frame.assign(datetime=long_frame["datetime"].dt.tz_localize("UTC"))
    assert_data_error(tmp_path, utc_frame, "column 'datetime': the dates have the time zone UTC")
    offsets = ["2020-03-06 00:00:00-05:00", "2020-03-09 00:00:00-04:00"] * len(long_frame)
    text = long_frame.assign(datetime=offsets[: len(long_frame)])
    assert_data_error(tmp_path, text, "column 'datetime': the dates have several time zones")


def test_columns_that_are_not_numeric_raise(tmp_path, long_frame):
    assert_data_error(tmp_path, long_frame.assign(name="x"), r"not numeric: 'name'.*columns=")


def test_a_cell_that_is_no_number_is_named_with_its_row(tmp_path, long_frame):
    table = long_frame.astype({"open": object})
    table.loc[7, "open"] = "abc"
    place = f"{table['datetime'][7]:%Y-%m-%d}, S00"
    message = rf"'open' \('abc' at {place}; 1 such cell\)"
    assert_data_error(tmp_path, table.astype({"open": str}), message)
    with pytest.raises(DataError, match=message):
        FrameSource(table)
    wide = pd.DataFrame({"date": ["2020-01-02", "2020-01-03"], "A": [1, 2], "B": [3, "x"]})
    (tmp_path / "wide").mkdir()
    wide.to_csv(tmp_path / "wide" / "close.csv", index=False)
    with pytest.raises(DataError, match=r"close.csv: .*'B' \('x' at 2020-01-03; 1 such cell\)"):
        TableSource(tmp_path / "wide", layout="wide").load()


def test_unknown_columns_raise(tmp_path, long_frame):
    assert_data_error(
        tmp_path, long_frame, r"unknown column 'clos'.*'close'", columns={"close": "clos"}
    )
    assert_data_error(
        tmp_path, long_frame, r"unknown column 'Date'.*'datetime'", columns={"datetime": "Date"}
    )
    assert_data_error(
        tmp_path,
        long_frame.rename(columns={"instrument": "holding"}),
        "no column for the instrument; set it with columns=",
    )
    assert_data_error(
        tmp_path,
        long_frame.rename(columns={"datetime": "moment"}),
        "no column for the datetime",
    )


def test_missing_dates_and_instruments_raise(tmp_path, long_frame):
    is_other_row = long_frame.index != 3
    for column, match in (("datetime", "have no date"), ("instrument", "have no instrument")):
        table = long_frame.assign(**{column: long_frame[column].where(is_other_row)})
        assert_data_error(tmp_path, table, match)


def test_invalid_paths_and_files_raise(tmp_path, long_frame):
    with pytest.raises(DataError, match="no file or folder"):
        TableSource(tmp_path / "no.parquet")
    with pytest.raises(ConfigError, match=r"unknown layout 'wid'.*'wide'"):
        TableSource(tmp_path, layout="wid")
    with pytest.raises(DataError, match="has no table"):
        TableSource(tmp_path).load()
    (tmp_path / "bars.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(DataError, match="cannot be read as a table"):
        TableSource(tmp_path / "bars.parquet").load()
    (tmp_path / "bars.txt").write_text("x")
    with pytest.raises(DataError, match="is not a table"):
        TableSource(tmp_path / "bars.txt").load()
    with pytest.raises(DataError, match="needs a folder"):
        TableSource(tmp_path / "bars.txt", layout="wide")


def test_files_with_different_columns_raise(tmp_path):
    days = pd.bdate_range("2020-01-01", periods=2)
    pd.DataFrame({"date": days, "close": 1.0, "pe": 2.0}).to_csv(tmp_path / "A.csv", index=False)
    pd.DataFrame({"date": days, "close": 1.0}).to_csv(tmp_path / "B.csv", index=False)
    with pytest.raises(DataError, match=r"\['pe'\] are not in all"):
        TableSource(tmp_path, layout="per_instrument").load()
    close_source = TableSource(tmp_path, layout="per_instrument", columns={"close": "close"})
    assert close_source.load().shape == (2, 2, 1)


def test_two_files_of_a_field_raise(tmp_path):
    for year in ("2019", "2020"):
        (tmp_path / year).mkdir()
        days = pd.bdate_range(f"{year}-01-01", periods=2)
        table = pd.DataFrame({"date": days, "A": 1.0})
        table.to_csv(tmp_path / year / "close.csv", index=False)
    table.to_csv(tmp_path / "open.csv", index=False)
    with pytest.raises(DataError, match=r"2019.close.csv and .*2020.close.csv have the same name"):
        TableSource(tmp_path, layout="wide").load()
    assert TableSource(tmp_path, layout="wide", columns={"open": "open"}).fields() == ("open",)


# -- real data -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_table_and_real_qlib_folder_agree(market_data):
    table = TableSource(market_data / "us_nyse500.parquet").load()
    qlib = QlibSource(market_data / "qlib_nyse500").load(table.fields)
    assert list(table.instruments) == list(qlib.instruments)
    assert torch.equal(table.mask, qlib.mask)
    assert torch.equal(table.spans, qlib.spans)
    torch.testing.assert_close(table.values, qlib.values, rtol=0, atol=0, equal_nan=True)


def test_path_that_is_no_path_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"path of TableSource is \[\]; expected a file"):
        TableSource([])
