"""QlibSource: reading a Qlib data folder, and errors for invalid folders and files."""

from __future__ import annotations

import logging
import os

import numpy as np
import pandas as pd
import pytest
import torch

import qtorch
from qtorch.core.errors import ArgumentError, ConfigError, DataError, ExpressionError
from qtorch.core.session import session_context
from qtorch.data.handler.loader import QlibDataLoader
from qtorch.data.source.frame import build_source, default_source
from qtorch.data.source.qlib import QlibSource

DAYS = pd.bdate_range("2020-01-01", periods=6)


def make_folder(folder, bins, instruments, freq="day", calendar=DAYS):
    """Write a Qlib data folder from `bins {(folder, field): (start, values)}` and text files."""
    for part in ("calendars", "instruments", "features"):
        (folder / part).mkdir(parents=True)
    (folder / "calendars" / f"{freq}.txt").write_text("\n".join(map(str, calendar)) + "\n")
    for name, text in instruments.items():
        (folder / "instruments" / f"{name}.txt").write_text(text)
    for (name, field), (start, values) in bins.items():
        path = folder / "features" / name
        path.mkdir(exist_ok=True)
        np.array([start, *values], dtype="<f4").tofile(path / f"{field}.{freq}.bin")
    return folder


@pytest.fixture
def handmade_folder(tmp_path):
    all_members = "AAA\t2020-01-01\t2020-01-08\nBbb\t2020-01-02\t2020-01-06\n"
    some_members = "AAA\t2020-01-01\t2020-01-02\nAAA\t2020-01-07\t2020-01-08\n"
    return make_folder(
        tmp_path / "data",
        {
            ("aaa", "close"): (0, [1, 2, 3, 4, 5, 6]),
            ("aaa", "pe"): (4, [30, 40]),
            ("bbb", "close"): (1, [20, float("nan"), 40]),
        },
        {"all": all_members, "some": some_members},
    )


def test_reads_values_calendar_and_spans(handmade_folder):
    panel = QlibSource(handmade_folder).load(["close", "pe"])
    nan = float("nan")
    assert list(panel.calendar) == list(DAYS)
    assert list(panel.instruments) == ["AAA", "Bbb"]
    expected = torch.tensor([[1, nan], [2, 20], [3, nan], [4, 40], [5, nan], [6, nan]])
    torch.testing.assert_close(panel.column("close"), expected, equal_nan=True)
    expected = torch.tensor([nan, nan, nan, nan, 30, 40])
    torch.testing.assert_close(panel.column("pe")[:, 0], expected, equal_nan=True)
    assert panel.column("pe")[:, 1].isnan().all()
    assert panel.spans.tolist() == [[0, 5], [1, 3]]
    # Bbb is stored on rows 1..3 and a member on 2020-01-02..06, that is rows 1..3.
    assert panel.mask.T.int().tolist() == [[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]]


def test_several_membership_spans(handmade_folder):
    panel = QlibSource(handmade_folder).load(["close"], instruments="some")
    assert panel.mask[:, 0].int().tolist() == [1, 1, 0, 0, 1, 1]
    # Values ignore membership, so that rolling windows see all stored rows.
    assert panel.column("close")[:, 0].tolist() == [1, 2, 3, 4, 5, 6]
    spans = QlibSource(handmade_folder).instruments("some")["AAA"]
    assert [str(a.date()) for span in spans for a in span] == [
        "2020-01-01",
        "2020-01-02",
        "2020-01-07",
        "2020-01-08",
    ]


def test_rows_before_and_after_the_dates(handmade_folder):
    source = QlibSource(handmade_folder)
    panel = source.load(
        ["close"], start_time="2020-01-03", end_time="2020-01-06", before=1, after=1
    )
    assert panel.column("close")[:, 0].tolist() == [2, 3, 4, 5]
    assert panel.spans.tolist() == [[0, 3], [0, 2]]
    wide = source.load(["close"], start_time="2020-01-03", end_time="2020-01-06", before=None)
    assert len(wide.calendar) == 4
    assert len(source.load(["close"], start_time="2020-01-03", before=99, after=None).calendar) == 6


def test_instruments_without_membership_in_the_dates_are_left_out(handmade_folder):
    panel = QlibSource(handmade_folder).load(["close"], start_time="2020-01-07")
    assert list(panel.instruments) == ["AAA"]


def test_a_list_and_a_mapping_of_instruments(handmade_folder):
    source = QlibSource(handmade_folder)
    assert list(source.load(["close"], instruments=["Bbb"]).instruments) == ["Bbb"]
    spans = {"AAA": [("2020-01-02", "2020-01-03")]}
    panel = source.load(["close"], instruments=spans)
    assert panel.mask[:, 0].int().tolist() == [0, 1, 1, 0, 0, 0]


def test_dollar_signs_and_upper_case_universe_names_are_accepted(handmade_folder):
    panel = QlibSource(handmade_folder).load(["$close"], instruments="ALL")
    assert panel.fields == ("close",)


def test_calendar_fields_universes(handmade_folder):
    (handmade_folder / "calendars" / "day_future.txt").write_text("2030-01-01\n")
    source = QlibSource(handmade_folder)
    assert source.fields() == ("close", "pe")
    assert source.find_fields(["pe", "open"]) == {"pe"}  # not every folder has it
    assert source.universes() == ("all", "some")
    assert list(source.calendar("2020-01-02", "2020-01-03")) == list(DAYS[1:3])


def test_intraday_frequency(tmp_path):
    stamps = pd.DatetimeIndex(["2020-01-02 09:31", "2020-01-02 09:32", "2020-01-03 09:31"])
    folder = make_folder(
        tmp_path / "data",
        {("aaa", "close"): (0, [1, 2, 3])},
        {"all": "AAA\t2020-01-02\t2020-01-02\n"},
        freq="1min",
        calendar=stamps,
    )
    source = QlibSource(folder)
    for name in ("1min", "min"):
        panel = source.load(["close"], freq=name, end_time="2020-01-02")
        assert panel.column("close")[:, 0].tolist() == [1, 2]
    assert source.load(["close"], freq="1min").mask[:, 0].tolist() == [True, True, False]
    assert source.frequencies() == ("1min",)
    assert len(source.load(["close"]).calendar) == 3  # the only frequency
    with pytest.raises(DataError, match=r"unknown frequency 'day'.*1min"):
        source.load(["close"], freq="day")


def test_a_folder_for_each_frequency(tmp_path):
    """Qlib's mapping as provider_uri; daily bars are the default, if there are any."""
    stamps = pd.DatetimeIndex(["2020-01-02 09:31", "2020-01-02 09:32", "2020-01-03 09:31"])
    universe = {"all": "AAA\t2020-01-01\t2020-01-08\n"}
    folders = {
        "day": make_folder(tmp_path / "day", {("aaa", "close"): (0, range(6))}, universe),
        "1min": make_folder(
            tmp_path / "minute",
            {("aaa", "close"): (0, [1, 2, 3])},
            universe,
            freq="1min",
            calendar=stamps,
        ),
        "5min": make_folder(
            tmp_path / "five",
            {("aaa", "open"): (0, [5])},
            universe,
            freq="5min",
            calendar=stamps[:1],
        ),
    }
    source = QlibSource(folders)
    assert source.frequencies() == ("1min", "5min", "day")
    assert source.resolve_frequency() == "day"
    assert source.load(["close"]).column("close")[:, 0].tolist() == list(range(6))
    assert source.load(["close"], freq="min").column("close")[:, 0].tolist() == [1, 2, 3]
    assert source.fields("5min") == ("open",)
    assert QlibSource(folders, freq="1min").calendar().equals(stamps.as_unit("ns"))
    assert QlibSource({"day": folders["day"]}).fingerprint() == (
        QlibSource(folders["day"]).fingerprint()
    )
    with pytest.raises(DataError, match=r"unknown frequency '30min'.*1min"):
        source.calendar(freq="30min")
    with pytest.raises(DataError, match=r"several frequencies \(1min, 5min\).*freq='1min'"):
        QlibSource({k: folders[k] for k in ("1min", "5min")}).calendar()
    with pytest.raises(DataError, match="no data folder"):
        QlibSource({"day": folders["day"], "1min": tmp_path / "nowhere"})
    session = qtorch.init(provider_uri=folders)
    assert session.provider_uri == {k: str(v) for k, v in folders.items()}
    assert default_source().frequencies() == source.frequencies()
    assert build_source(QlibSource().to_config()).fingerprint() == source.fingerprint()


def test_an_instrument_called_na_and_one_called_con(tmp_path):
    folder = make_folder(
        tmp_path / "data",
        {("na", "close"): (0, [1] * 6), ("_qlib_con", "close"): (0, [2] * 6)},
        {"all": "NA\t2020-01-01\t2020-01-08\nCON\t2020-01-01\t2020-01-08\n"},
    )
    panel = QlibSource(folder).load(["close"])
    assert panel.column("close")[0].tolist() == [2, 1]
    assert list(panel.instruments) == ["CON", "NA"]


# -- invalid folders, names and files -------------------------------------------------------------


def assert_one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_missing_folders_raise(tmp_path, writable_folder):
    with pytest.raises(DataError, match="no data folder"):
        QlibSource(tmp_path / "nowhere")
    os.rename(writable_folder / "calendars", tmp_path / "away")
    with pytest.raises(DataError, match="no folder 'calendars'") as error:
        QlibSource(writable_folder)
    assert str(writable_folder) in assert_one_line(error)
    with pytest.raises(ConfigError, match="needs a folder"):
        QlibSource()


def test_unknown_names_raise_with_the_nearest_name(writable_folder):
    source = QlibSource(writable_folder)
    with pytest.raises(DataError, match=r"unknown universe 'alll'.*'all'"):
        source.load(instruments="alll")
    with pytest.raises(DataError, match=r"unknown field 'clsoe'.*'close'") as error:
        source.load(["open", "clsoe"])
    assert_one_line(error)
    with pytest.raises(ExpressionError, match=r"unknown field 'clsoe'.*'close'") as error:
        source.features("all", ["$open", "Mean($clsoe, 5)"])
    assert str(error.value).splitlines()[1:] == ["    Mean($clsoe, 5)", "         ^^^^^^"]
    with pytest.raises(ExpressionError, match=r"unknown field 'clsoe'"):
        QlibDataLoader({"feature": ["$clsoe"]}, source=source).view()
    with pytest.raises(DataError, match=r"unknown instrument 'S0O'.*S0"):
        source.load(instruments=["S0O"])
    with pytest.raises(DataError, match=r"unknown frequency '5min'.*day"):
        source.calendar(freq="5min")
    with pytest.raises(DataError, match="not a frequency"):
        source.calendar(freq="*")
    with pytest.raises(ArgumentError, match=r"'provider_url'.*'provider_uri'"):
        QlibSource(provider_url=str(writable_folder))


def test_empty_selections_raise(writable_folder):
    source = QlibSource(writable_folder)
    with pytest.raises(DataError, match=r"no trading day.*2018-01-01\.\.2019-12-31"):
        source.load(start_time="2031-01-01")
    with pytest.raises(DataError, match="no trading day"):
        source.load(start_time="2019-01-01", end_time="2018-06-01")
    with pytest.raises(DataError, match=r"has no member between"):
        source.load(instruments={"S00": [("2001-01-01", "2002-01-01")]})
    with pytest.raises(DataError, match=r"has no member"):
        source.load(instruments=[])


@pytest.mark.parametrize("num_bytes", [0, 2, 5, 1001, 1003])
def test_a_file_truncated_within_a_value_raises(writable_folder, num_bytes):
    path = writable_folder / "features" / "s01" / "close.day.bin"
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(DataError, match="is truncated") as error:
        QlibSource(writable_folder).load(["open", "close"])
    assert "s01/close.day.bin" in assert_one_line(error)


@pytest.mark.parametrize("fields", [["open", "close"], ["close"], ["mine"]])
def test_a_file_that_ends_before_another_field_raises(writable_folder, caplog, fields):
    folder = writable_folder / "features" / "s01"
    (folder / "mine.day.bin").write_bytes((folder / "close.day.bin").read_bytes())
    path = folder / f"{fields[-1]}.day.bin"
    path.write_bytes(path.read_bytes()[:1000])
    message = rf"s01/{fields[-1]}.day.bin ends at calendar row 248, .* at 521 .*strict=False"
    with pytest.raises(DataError, match=message) as error:
        QlibSource(writable_folder).load(fields)
    assert_one_line(error)
    with caplog.at_level(logging.WARNING):
        panel = QlibSource(writable_folder, strict=False).load(fields)
    assert "may be truncated" in caplog.text
    assert panel.column(fields[-1])[:, 1].isnan().any()


def test_a_field_that_starts_later_is_valid(writable_folder):
    late = np.array([500, *range(22)], dtype="<f4")
    late.tofile(writable_folder / "features" / "s01" / "mine.day.bin")
    source = QlibSource(writable_folder)
    assert source.load(["mine"]).column("mine")[-1, 1] == 21
    assert source.load(["close"]).spans[1].tolist() == [0, 521]


def test_a_file_without_values_raises(writable_folder, caplog):
    path = writable_folder / "features" / "s01" / "close.day.bin"
    path.write_bytes(path.read_bytes()[:4])
    with pytest.raises(DataError, match=r"s01/close.day.bin has no values; it may be") as error:
        QlibSource(writable_folder).load(["open", "close"])
    assert_one_line(error)
    with caplog.at_level(logging.WARNING):
        panel = QlibSource(writable_folder, strict=False).load(["open", "close"])
    assert "has no values" in caplog.text
    assert panel.column("close")[:, 1].isnan().all()


def test_a_file_longer_than_the_calendar_raises(writable_folder):
    path = writable_folder / "features" / "s01" / "close.day.bin"
    path.write_bytes(path.read_bytes() + np.ones(1000, dtype="<f4").tobytes())
    with pytest.raises(DataError, match="but the calendar has 522 rows"):
        QlibSource(writable_folder).load(["close"])


@pytest.mark.parametrize("start", [-1.0, 0.5, float("nan"), float("inf")])
def test_an_invalid_start_row_raises(writable_folder, start):
    np.array([start, 1, 2], dtype="<f4").tofile(
        writable_folder / "features" / "s01" / "close.day.bin"
    )
    with pytest.raises(DataError, match="is corrupt: its first value"):
        QlibSource(writable_folder).load(["close"])


def test_invalid_text_files_raise(writable_folder):
    universe = writable_folder / "instruments" / "all.txt"
    original = universe.read_text()
    universe.write_text(original + "S09 2018-01-01\n")
    with pytest.raises(
        DataError, match=r"all.txt, line 4: expected tab-separated instrument, start"
    ):
        QlibSource(writable_folder).load()
    universe.write_text(original + "S09\tx\ty\n")
    with pytest.raises(DataError, match="dates cannot be parsed"):
        QlibSource(writable_folder).load()
    universe.write_text(original)
    calendar = writable_folder / "calendars" / "day.txt"
    calendar.write_text("2018-01-02\n2018-01-01\n")
    with pytest.raises(DataError, match="ascending"):
        QlibSource(writable_folder).load()


def test_instruments_without_a_folder_are_skipped_with_a_warning(writable_folder, caplog):
    universe = writable_folder / "instruments" / "all.txt"
    universe.write_text(universe.read_text() + "GHOST\t2018-01-01\t2019-12-31\n")
    with caplog.at_level(logging.WARNING):
        panel = QlibSource(writable_folder).load()
    assert list(panel.instruments) == ["S00", "S01", "S02"]
    assert "GHOST" in caplog.text
    with pytest.raises(DataError, match="none of the 1 instruments has a folder"):
        QlibSource(writable_folder).load(instruments=["GHOST"])


# -- configuration and content -------------------------------------------------------------------


def test_config_contains_the_default_folder(writable_folder):
    with session_context(provider_uri=str(writable_folder)):
        source = QlibSource()
    assert source.to_config() == {
        "_target_": "qtorch.data.QlibSource",
        "provider_uri": str(writable_folder),
    }


def test_fingerprint_depends_on_the_content_and_not_on_the_path(writable_folder, tmp_path):
    first = QlibSource(writable_folder).fingerprint()
    renamed_folder = writable_folder.rename(tmp_path / "renamed")
    assert QlibSource(renamed_folder).fingerprint() == first
    path = renamed_folder / "features" / "s01" / "close.day.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    assert QlibSource(renamed_folder).fingerprint() != first
