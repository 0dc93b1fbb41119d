"""write_qlib: the written folder as read by QlibSource and by Qlib itself."""

from __future__ import annotations

import json
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.errors import DataError
from qtorch.data.source import writer as qlib_writer
from qtorch.data.source.frame import FrameSource
from qtorch.data.source.qlib import QlibSource
from qtorch.data.source.writer import write_qlib


@pytest.mark.parametrize("universe", ["all", "stocks", "liquid"])
def test_written_data_is_read_back_unchanged(market, qlib_source, universe):
    panel = market.load(instruments=universe)
    read = qlib_source.load(panel.fields, instruments=universe)
    assert list(read.instruments) == list(panel.instruments)
    assert read.calendar.equals(panel.calendar)
    assert torch.equal(read.mask, panel.mask)
    assert torch.equal(read.spans, panel.spans)
    torch.testing.assert_close(read.values, panel.values, rtol=0, atol=0, equal_nan=True)


def test_a_file_has_the_start_row_and_the_values_of_the_span(market, qlib_folder):
    panel = market.load(["close"])
    late = int((panel.spans[:, 0] > 0).nonzero()[0, 0])
    name, (first, last) = panel.instruments[late], panel.spans[late].tolist()
    content = np.fromfile(qlib_folder / "features" / name.lower() / "close.day.bin", dtype="<f4")
    assert content[0] == first
    assert len(content) == last - first + 2
    np.testing.assert_array_equal(content[1:], panel.column("close")[first : last + 1, late])


def test_write_a_frame_with_additional_universes(tmp_path, long_frame):
    frame = long_frame.set_index(["datetime", "instrument"])
    folder = write_qlib(
        frame,
        tmp_path / "new" / "market",
        fields=["close"],
        universes={"Two": ["S01", "S02"], "some": {"S03": [("2018-03-01", "2018-04-02")]}},
    )
    source = QlibSource(folder)
    assert source.fields() == ("close",)
    assert source.universes() == ("all", "some", "two")
    assert list(source.instruments("two")) == ["S01", "S02"]
    first, last = source.instruments("some")["S03"][0]
    assert (str(first.date()), str(last.date())) == ("2018-03-01", "2018-04-02")


def test_the_mask_of_a_panel_becomes_a_universe(tmp_path, market):
    panel = market.load(["close"], instruments="liquid")
    source = QlibSource(write_qlib(panel, tmp_path / "market"))
    assert source.universes() == ("all", "members")
    assert torch.equal(source.load(["close"], instruments="members").mask, panel.mask)


def test_intraday_dates_keep_their_time(tmp_path):
    stamps = pd.date_range("2020-01-02 09:31", periods=5, freq="min")
    index = pd.MultiIndex.from_product([stamps, ["A"]], names=["datetime", "instrument"])
    source = FrameSource(pd.DataFrame({"close": np.arange(5.0)}, index), freq="1min")
    read = QlibSource(write_qlib(source, tmp_path / "market", freq="1min"))
    assert read.calendar(freq="1min").equals(stamps.as_unit("ns"))
    assert read.load(freq="1min").column("close")[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_an_existing_folder_needs_overwrite(tmp_path, market, writable_folder):
    panel = market.load(["close"], instruments=["S05"])
    with pytest.raises(DataError, match="overwrite=True"):
        write_qlib(panel, writable_folder)
    write_qlib(panel, writable_folder, overwrite=True)
    assert list(QlibSource(writable_folder).instruments()) == ["S05"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["market"]
    unrelated_folder = tmp_path / "documents"
    unrelated_folder.mkdir()
    (unrelated_folder / "letter").write_text("x")
    with pytest.raises(DataError, match="not a Qlib data folder, so it is not overwritten"):
        write_qlib(panel, unrelated_folder, overwrite=True)
    assert (unrelated_folder / "letter").exists()


def test_a_failed_write_keeps_the_old_folder_and_leaves_no_files(
    tmp_path, market, writable_folder, monkeypatch
):
    before = QlibSource(writable_folder).fingerprint()

    def raise_disk_full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(qlib_writer, "_write_files", raise_disk_full)
    with pytest.raises(OSError, match="No space"):
        write_qlib(market, writable_folder, overwrite=True)
    with pytest.raises(OSError, match="No space"):
        write_qlib(market, tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["market"]
    assert QlibSource(writable_folder).fingerprint() == before


@pytest.mark.parametrize("name", ["A/B", "A\tB", " A", ""])
def test_invalid_folder_names_raise(tmp_path, name):
    index = pd.MultiIndex.from_product([pd.bdate_range("2020-01-01", periods=2), [name]])
    frame = pd.DataFrame({"close": [1.0, 2.0]}, index.set_names(["datetime", "instrument"]))
    with pytest.raises(DataError, match="cannot be the name of a folder"):
        write_qlib(frame, tmp_path / "market")


def test_names_that_share_a_folder_raise(tmp_path):
    index = pd.MultiIndex.from_product([pd.bdate_range("2020-01-01", periods=2), ["ab", "AB"]])
    frame = pd.DataFrame({"close": np.ones(4)}, index.set_names(["datetime", "instrument"]))
    with pytest.raises(DataError, match=r"'AB' and 'ab' would share one folder"):
        write_qlib(frame, tmp_path / "market")


DATES = {"start_time": "2018-06-01", "end_time": "2019-03-29"}
QLIB_PROGRAM = """
import json, sys, warnings
warnings.filterwarnings("ignore")
import qlib
from qlib.data import D
folder, out = sys.argv[1:]
qlib.init(provider_uri=folder, region="us", kernels=1, logging_level=40,
          exp_manager={"class": "MLflowExpManager", "module_path": "qlib.workflow.expm",
                       "kwargs": {"uri": "sqlite:///" + out + ".db", "default_exp_name": "x"}})
result = {"calendar": [str(d) for d in D.calendar()]}
for universe in ("all", "stocks", "liquid"):
    spans = D.list_instruments(D.instruments(universe))
    result[universe] = {k: [[str(a), str(b)] for a, b in v] for k, v in spans.items()}
fields = ["$open", "$high", "$low", "$close", "$volume", "$vwap", "$factor", "$change"]
D.features(D.instruments("all"), fields).to_pickle(out + ".all")
dates = "2018-06-01", "2019-03-29"
expressions = ["$close/Ref($close, 1)-1", "Mean($volume, 5)", "Ref($close, -2)/Ref($close, -1)-1"]
D.features(D.instruments("liquid"), expressions, *dates).to_pickle(out + ".expressions")
D.features(D.instruments("liquid"), fields, *dates).to_pickle(out + ".liquid")
json.dump(result, open(out + ".json", "w"))
"""


@pytest.mark.qlib
def test_qlib_reads_the_written_folder(market, qlib_folder, qlib_source, qlib_python, tmp_path):
    out = str(tmp_path / "out")
    command = [qlib_python, "-c", QLIB_PROGRAM, str(qlib_folder), out]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]
    with open(out + ".json") as file:
        qlib_calendars = json.load(file)
    assert qlib_calendars["calendar"] == [str(d) for d in market.calendar()]
    for universe in ("all", "stocks", "liquid"):
        membership = qlib_source.instruments(universe)
        spans = {k: [[str(a), str(b)] for a, b in v] for k, v in membership.items()}
        assert qlib_calendars[universe] == spans
    fields = ["open", "high", "low", "close", "volume", "vwap", "factor", "change"]
    for universe, dates in (("all", {}), ("liquid", DATES)):
        qlib_frame = pd.read_pickle(f"{out}.{universe}")
        frame = qlib_source.load(fields, instruments=universe, **dates).to_frame()
        frame = frame.swaplevel().sort_index()
        assert list(frame.index) == list(qlib_frame.index)
        np.testing.assert_array_equal(frame.to_numpy(), qlib_frame.to_numpy())
    expressions = [
        "$close/Ref($close, 1)-1",
        "Mean($volume, 5)",
        "Ref($close, -2)/Ref($close, -1)-1",
    ]
    qlib_frame = pd.read_pickle(f"{out}.expressions")
    frame = qlib_source.features("liquid", expressions, "2018-06-01", "2019-03-29")
    assert list(frame.index) == list(qlib_frame.index)
    assert frame.index.names == qlib_frame.index.names
    assert list(frame.columns) == list(qlib_frame.columns)
    np.testing.assert_allclose(frame.to_numpy(), qlib_frame.to_numpy(), rtol=1e-4, atol=1e-6)
