"""Qlib's files: what the reader finds in them, and what it refuses."""

from __future__ import annotations

import logging
import os

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.errors import ArgumentError, ConfigError, DataError, ExpressionError
from qtorch.core.session import session_context
from qtorch.data.loader import QlibDataLoader
from qtorch.data.source.qlib import QlibSource

DAYS = pd.bdate_range("2020-01-01", periods=6)


def make_folder(folder, bins, instruments, freq="day", calendar=DAYS):
    """A data folder by hand: `bins {(folder, field): (start, values)}`, text of universes."""
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
def by_hand(tmp_path):
    everything = "AAA\t2020-01-01\t2020-01-08\nBbb\t2020-01-02\t2020-01-06\n"
    some = "AAA\t2020-01-01\t2020-01-02\nAAA\t2020-01-07\t2020-01-08\n"
    return make_folder(
        tmp_path / "data",
        {
            ("aaa", "close"): (0, [1, 2, 3, 4, 5, 6]),
            ("aaa", "pe"): (4, [30, 40]),
            ("bbb", "close"): (1, [20, float("nan"), 40]),
        },
        {"all": everything, "some": some},
    )


def test_reads_values_calendar_and_spans_by_hand(by_hand):
    panel = QlibSource(by_hand).load(["close", "pe"])
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


def test_several_membership_spans(by_hand):
    panel = QlibSource(by_hand).load(["close"], instruments="some")
    assert panel.mask[:, 0].int().tolist() == [1, 1, 0, 0, 1, 1]
    # Values are all that is stored, whatever the membership: windows look through it.
    assert panel.column("close")[:, 0].tolist() == [1, 2, 3, 4, 5, 6]
    spans = QlibSource(by_hand).instruments("some")["AAA"]
    assert [str(a.date()) for span in spans for a in span] == [
        "2020-01-01",
        "2020-01-02",
        "2020-01-07",
        "2020-01-08",
    ]


def test_rows_before_and_after_the_dates(by_hand):
    source = QlibSource(by_hand)
    panel = source.load(
        ["close"], start_time="2020-01-03", end_time="2020-01-06", before=1, after=1
    )
    assert panel.column("close")[:, 0].tolist() == [2, 3, 4, 5]
    assert panel.spans.tolist() == [[0, 3], [0, 2]]
    wide = source.load(["close"], start_time="2020-01-03", end_time="2020-01-06", before=None)
    assert len(wide.calendar) == 4
    assert len(source.load(["close"], start_time="2020-01-03", before=99, after=None).calendar) == 6


def test_an_instrument_that_is_no_member_between_the_dates_is_left_out(by_hand):
    panel = QlibSource(by_hand).load(["close"], start_time="2020-01-07")
    assert list(panel.instruments) == ["AAA"]


def test_a_list_and_a_mapping_of_instruments(by_hand):
    source = QlibSource(by_hand)
    assert list(source.load(["close"], instruments=["Bbb"]).instruments) == ["Bbb"]
    spans = {"AAA": [("2020-01-02", "2020-01-03")]}
    panel = source.load(["close"], instruments=spans)
    assert panel.mask[:, 0].int().tolist() == [0, 1, 1, 0, 0, 0]


def test_field_names_with_dollar_and_universe_names_as_qlib_finds_them(by_hand):
    panel = QlibSource(by_hand).load(["$close"], instruments="ALL")
    assert panel.fields == ("close",)


def test_calendar_fields_universes(by_hand):
    (by_hand / "calendars" / "day_future.txt").write_text("2030-01-01\n")
    source = QlibSource(by_hand)
    assert source.fields() == ("close", "pe")
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
    with pytest.raises(DataError, match=r"unknown frequency 'day'.*1min"):
        source.load(["close"])


def test_an_instrument_called_na_and_one_called_con(tmp_path):
    folder = make_folder(
        tmp_path / "data",
        {("na", "close"): (0, [1] * 6), ("_qlib_con", "close"): (0, [2] * 6)},
        {"all": "NA\t2020-01-01\t2020-01-08\nCON\t2020-01-01\t2020-01-08\n"},
    )
    panel = QlibSource(folder).load(["close"])
    assert panel.column("close")[0].tolist() == [2, 1]
    assert list(panel.instruments) == ["CON", "NA"]


# -- what is refused -----------------------------------------------------------------------------


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_missing_folders(tmp_path, own_folder):
    with pytest.raises(DataError, match="no data folder"):
        QlibSource(tmp_path / "nowhere")
    os.rename(own_folder / "calendars", tmp_path / "away")
    with pytest.raises(DataError, match="no folder 'calendars'") as error:
        QlibSource(own_folder)
    assert str(own_folder) in one_line(error)
    with pytest.raises(ConfigError, match="needs a folder"):
        QlibSource()


def test_unknown_names_show_the_nearest(own_folder):
    source = QlibSource(own_folder)
    with pytest.raises(DataError, match=r"unknown universe 'alll'.*'all'"):
        source.load(instruments="alll")
    with pytest.raises(DataError, match=r"unknown field 'clsoe'.*'close'") as error:
        source.load(["open", "clsoe"])
    one_line(error)
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
        QlibSource(provider_url=str(own_folder))


def test_empty_selections_say_what_is_there(own_folder):
    source = QlibSource(own_folder)
    with pytest.raises(DataError, match=r"no trading day.*2018-01-01\.\.2019-12-31"):
        source.load(start_time="2031-01-01")
    with pytest.raises(DataError, match="no trading day"):
        source.load(start_time="2019-01-01", end_time="2018-06-01")
    with pytest.raises(DataError, match=r"has no member between"):
        source.load(instruments={"S00": [("2001-01-01", "2002-01-01")]})
    with pytest.raises(DataError, match=r"has no member"):
        source.load(instruments=[])


@pytest.mark.parametrize("keep", [0, 2, 5, 1001, 1003])
def test_a_file_cut_within_a_value(own_folder, keep):
    path = own_folder / "features" / "s01" / "close.day.bin"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="cut in the middle") as error:
        QlibSource(own_folder).load(["open", "close"])
    assert "s01/close.day.bin" in one_line(error)


@pytest.mark.parametrize("loaded", [["open", "close"], ["close"], ["mine"]])
def test_a_file_cut_between_values_is_seen_by_its_siblings(own_folder, caplog, loaded):
    folder = own_folder / "features" / "s01"
    (folder / "mine.day.bin").write_bytes((folder / "close.day.bin").read_bytes())
    path = folder / f"{loaded[-1]}.day.bin"
    path.write_bytes(path.read_bytes()[:1000])
    said = rf"s01/{loaded[-1]}.day.bin ends at calendar row 248, .* at 521 .*strict=False"
    with pytest.raises(DataError, match=said) as error:
        QlibSource(own_folder).load(loaded)
    one_line(error)
    with caplog.at_level(logging.WARNING):
        panel = QlibSource(own_folder, strict=False).load(loaded)
    assert "cut in the middle" in caplog.text
    assert panel.column(loaded[-1])[:, 1].isnan().any()


def test_a_field_that_begins_later_is_whole(own_folder):
    late = np.array([500, *range(22)], dtype="<f4")
    late.tofile(own_folder / "features" / "s01" / "mine.day.bin")
    source = QlibSource(own_folder)
    assert source.load(["mine"]).column("mine")[-1, 1] == 21
    assert source.load(["close"]).spans[1].tolist() == [0, 521]


def test_a_file_cut_behind_its_first_number(own_folder, caplog):
    path = own_folder / "features" / "s01" / "close.day.bin"
    path.write_bytes(path.read_bytes()[:4])
    with pytest.raises(DataError, match=r"s01/close.day.bin holds no value: cut in the") as error:
        QlibSource(own_folder).load(["open", "close"])
    one_line(error)
    with caplog.at_level(logging.WARNING):
        panel = QlibSource(own_folder, strict=False).load(["open", "close"])
    assert "holds no value" in caplog.text
    assert panel.column("close")[:, 1].isnan().all()


def test_a_file_longer_than_the_calendar(own_folder):
    path = own_folder / "features" / "s01" / "close.day.bin"
    path.write_bytes(path.read_bytes() + np.ones(1000, dtype="<f4").tobytes())
    with pytest.raises(DataError, match="but the calendar has 522 rows"):
        QlibSource(own_folder).load(["close"])


@pytest.mark.parametrize("start", [-1.0, 0.5, float("nan"), float("inf")])
def test_a_start_row_that_is_none(own_folder, start):
    np.array([start, 1, 2], dtype="<f4").tofile(own_folder / "features" / "s01" / "close.day.bin")
    with pytest.raises(DataError, match="is damaged: its first value"):
        QlibSource(own_folder).load(["close"])


def test_damaged_text_files(own_folder):
    universe = own_folder / "instruments" / "all.txt"
    kept = universe.read_text()
    universe.write_text(kept + "S09 2018-01-01\n")
    with pytest.raises(DataError, match=r"all.txt, line 4: expected instrument, start and end"):
        QlibSource(own_folder).load()
    universe.write_text(kept + "S09\tx\ty\n")
    with pytest.raises(DataError, match="cannot be read as dates"):
        QlibSource(own_folder).load()
    universe.write_text(kept)
    calendar = own_folder / "calendars" / "day.txt"
    calendar.write_text("2018-01-02\n2018-01-01\n")
    with pytest.raises(DataError, match="ascend"):
        QlibSource(own_folder).load()


def test_instruments_without_a_folder_yield_nothing_with_a_warning(own_folder, caplog):
    universe = own_folder / "instruments" / "all.txt"
    universe.write_text(universe.read_text() + "GHOST\t2018-01-01\t2019-12-31\n")
    with caplog.at_level(logging.WARNING):
        panel = QlibSource(own_folder).load()
    assert list(panel.instruments) == ["S00", "S01", "S02"]
    assert "GHOST" in caplog.text
    with pytest.raises(DataError, match="none of the 1 instruments has a folder"):
        QlibSource(own_folder).load(instruments=["GHOST"])


# -- configuration and content -------------------------------------------------------------------


def test_configuration_carries_the_folder_that_a_default_gave(own_folder):
    with session_context(provider_uri=str(own_folder)):
        source = QlibSource()
    assert source.to_config() == {
        "_target_": "qtorch.data.source.qlib.QlibSource",
        "provider_uri": str(own_folder),
    }


def test_fingerprint_follows_content_and_not_place(own_folder, tmp_path):
    first = QlibSource(own_folder).fingerprint()
    moved = own_folder.rename(tmp_path / "elsewhere")
    assert QlibSource(moved).fingerprint() == first
    path = moved / "features" / "s01" / "close.day.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    assert QlibSource(moved).fingerprint() != first
