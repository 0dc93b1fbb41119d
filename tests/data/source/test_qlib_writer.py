"""The writer of Qlib's files: what is read back, by us and by real Qlib."""

from __future__ import annotations

import json
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.errors import DataError
from qtorch.data.source import qlib_writer
from qtorch.data.source.frame import FrameSource
from qtorch.data.source.qlib import QlibSource
from qtorch.data.source.qlib_writer import write_qlib


@pytest.mark.parametrize("universe", ["all", "stocks", "liquid"])
def test_what_is_written_is_read_back(market, qlib_source, universe):
    ours = market.load(instruments=universe)
    read = qlib_source.load(ours.fields, instruments=universe)
    assert list(read.instruments) == list(ours.instruments)
    assert read.calendar.equals(ours.calendar)
    assert torch.equal(read.mask, ours.mask)
    assert torch.equal(read.spans, ours.spans)
    torch.testing.assert_close(read.values, ours.values, rtol=0, atol=0, equal_nan=True)


def test_the_start_row_and_the_length_of_a_file(market, qlib_folder):
    panel = market.load(["close"])
    late = int((panel.spans[:, 0] > 0).nonzero()[0, 0])
    name, (first, last) = panel.instruments[late], panel.spans[late].tolist()
    content = np.fromfile(qlib_folder / "features" / name.lower() / "close.day.bin", dtype="<f4")
    assert content[0] == first
    assert len(content) == last - first + 2
    np.testing.assert_array_equal(content[1:], panel.column("close")[first : last + 1, late])


def test_a_frame_and_further_universes(tmp_path, long_frame):
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


def test_a_panel_keeps_its_mask_as_a_universe(tmp_path, market):
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


def test_an_existing_folder_is_kept_unless_told(tmp_path, market, own_folder):
    panel = market.load(["close"], instruments=["S05"])
    with pytest.raises(DataError, match="overwrite=True"):
        write_qlib(panel, own_folder)
    write_qlib(panel, own_folder, overwrite=True)
    assert list(QlibSource(own_folder).instruments()) == ["S05"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["market"]
    other = tmp_path / "letters"
    other.mkdir()
    (other / "dear").write_text("x")
    with pytest.raises(DataError, match="no Qlib data folder, so it is not overwritten"):
        write_qlib(panel, other, overwrite=True)
    assert (other / "dear").exists()


def test_a_failure_leaves_the_old_market_and_nothing_else(
    tmp_path, market, own_folder, monkeypatch
):
    before = QlibSource(own_folder).fingerprint()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(qlib_writer, "_write", full)
    with pytest.raises(OSError, match="No space"):
        write_qlib(market, own_folder, overwrite=True)
    with pytest.raises(OSError, match="No space"):
        write_qlib(market, tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["market"]
    assert QlibSource(own_folder).fingerprint() == before


@pytest.mark.parametrize("name", ["A/B", "A\tB", " A", ""])
def test_names_that_no_folder_can_have(tmp_path, name):
    index = pd.MultiIndex.from_product([pd.bdate_range("2020-01-01", periods=2), [name]])
    frame = pd.DataFrame({"close": [1.0, 2.0]}, index.set_names(["datetime", "instrument"]))
    with pytest.raises(DataError, match="cannot be the name of a folder"):
        write_qlib(frame, tmp_path / "market")


def test_names_that_would_share_a_folder(tmp_path):
    index = pd.MultiIndex.from_product([pd.bdate_range("2020-01-01", periods=2), ["ab", "AB"]])
    frame = pd.DataFrame({"close": np.ones(4)}, index.set_names(["datetime", "instrument"]))
    with pytest.raises(DataError, match=r"'AB' and 'ab' would share one folder"):
        write_qlib(frame, tmp_path / "market")


DATES = {"start_time": "2018-06-01", "end_time": "2019-03-29"}
ASK_QLIB = """
import json, sys, warnings
warnings.filterwarnings("ignore")
import qlib
from qlib.data import D
folder, out = sys.argv[1:]
qlib.init(provider_uri=folder, region="us", kernels=1, logging_level=40,
          exp_manager={"class": "MLflowExpManager", "module_path": "qlib.workflow.expm",
                       "kwargs": {"uri": "sqlite:///" + out + ".db", "default_exp_name": "x"}})
found = {"calendar": [str(d) for d in D.calendar()]}
for universe in ("all", "stocks", "liquid"):
    spans = D.list_instruments(D.instruments(universe))
    found[universe] = {k: [[str(a), str(b)] for a, b in v] for k, v in spans.items()}
fields = ["$open", "$high", "$low", "$close", "$volume", "$vwap", "$factor", "$change"]
D.features(D.instruments("all"), fields).to_pickle(out + ".all")
made = ["$close/Ref($close, 1)-1", "Mean($volume, 5)", "Ref($close, -2)/Ref($close, -1)-1"]
D.features(D.instruments("liquid"), made, "2018-06-01", "2019-03-29").to_pickle(out + ".made")
D.features(D.instruments("liquid"), fields, "2018-06-01", "2019-03-29").to_pickle(out + ".liquid")
json.dump(found, open(out + ".json", "w"))
"""


@pytest.mark.qlib
def test_real_qlib_reads_what_is_written(market, qlib_folder, qlib_source, qlib_python, tmp_path):
    out = str(tmp_path / "out")
    command = [qlib_python, "-c", ASK_QLIB, str(qlib_folder), out]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    with open(out + ".json") as file:
        found = json.load(file)
    assert found["calendar"] == [str(d) for d in market.calendar()]
    for universe in ("all", "stocks", "liquid"):
        ours = qlib_source.instruments(universe)
        spans = {k: [[str(a), str(b)] for a, b in v] for k, v in ours.items()}
        assert found[universe] == spans
    fields = ["open", "high", "low", "close", "volume", "vwap", "factor", "change"]
    for universe, dates in (("all", {}), ("liquid", DATES)):
        theirs = pd.read_pickle(f"{out}.{universe}")
        mine = qlib_source.load(fields, instruments=universe, **dates).to_frame()
        mine = mine.swaplevel().sort_index()
        assert list(mine.index) == list(theirs.index)
        np.testing.assert_array_equal(mine.to_numpy(), theirs.to_numpy())
    made = ["$close/Ref($close, 1)-1", "Mean($volume, 5)", "Ref($close, -2)/Ref($close, -1)-1"]
    theirs = pd.read_pickle(f"{out}.made")
    mine = qlib_source.features("liquid", made, "2018-06-01", "2019-03-29")
    assert list(mine.index) == list(theirs.index)
    assert mine.index.names == theirs.index.names
    assert list(mine.columns) == list(theirs.columns)
    np.testing.assert_allclose(mine.to_numpy(), theirs.to_numpy(), rtol=1e-4, atol=1e-6)
