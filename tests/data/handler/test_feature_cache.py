"""The feature cache: equal values, one computation, a bounded size, safe under failures."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.errors import ConfigError, DataError
from qtorch.data import Alpha158, Alpha360, DataHandlerLP, TSDatasetH
from qtorch.data.handler import feature_cache
from qtorch.data.handler.feature_cache import BYTES_VARIABLE, FeatureCache, use_feature_cache
from qtorch.data.handler.loader import QlibDataLoader
from qtorch.data.panel.columns import PanelColumns
from qtorch.data.panel.panel import Panel
from qtorch.data.panel.view import View
from qtorch.data.source.qlib import QlibSource
from qtorch.data.source.synthetic import SyntheticSource
from qtorch.data.source.writer import write_qlib

COLUMNS = ["KMID", "MA5", "STD10"]


@pytest.fixture(scope="module")
def market(tmp_path_factory) -> Path:
    """Eight stocks over a year, in Qlib's layout."""
    source = SyntheticSource(8, "2018-01-01", "2018-12-31", num_sectors=2, seed=1)
    return write_qlib(source, tmp_path_factory.mktemp("cached") / "market")


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "features"


def handler(market, folder, kind=Alpha158, **options):
    options = {"columns": COLUMNS, "start_time": "2018-03-01", "end_time": "2018-11-30", **options}
    return kind("stocks", source=str(market), cache=folder, **options)


def assert_frames_equal(first: pd.DataFrame, second: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(first, second, check_exact=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Alpha158, Alpha360])
def test_cached_features_equal_computed_features(market, folder, kind):
    options = {} if kind is Alpha158 else {"columns": None, "infer_processors": ["Fillna"]}
    plain = handler(market, False, kind, **options)
    first, second = (handler(market, folder, kind, **options) for _ in range(2))
    segments = {"train": ("2018-04-02", "2018-08-31"), "test": ("2018-09-03", "2018-11-30")}
    datasets = [TSDatasetH(h, segments, step_len=5) for h in (plain, first, second)]
    for key in ("raw", "infer", "learn"):
        frames = [h.fetch(data_key=key, col_set="__raw") for h in (plain, first, second)]
        assert_frames_equal(frames[0], frames[1])
        assert_frames_equal(frames[0], frames[2])
    expected_samples, *other_samples = (d.samples("train", data_key="learn") for d in datasets)
    for samples in other_samples:
        assert samples.index.equals(expected_samples.index)
        assert torch.equal(samples.target.nan_to_num(9), expected_samples.target.nan_to_num(9))
    assert len(FeatureCache(folder).entries()) == 1


def test_features_are_computed_once_and_read_by_memory_map(market, folder, monkeypatch):
    handler(market, folder).view("raw")
    monkeypatch.setattr(QlibDataLoader, "_compute_view", None)  # computing would fail
    view = handler(market, folder).view("raw")
    panel = view.groups["feature"].plain_panel()
    assert panel.values.permute(1, 0, 2).is_contiguous()  # packing needs no copy
    # The map is private: writes are not visible to other readers.
    panel.values.zero_()
    second_panel = handler(market, folder).view("raw").groups["feature"].plain_panel()
    assert float(second_panel.values.nan_to_num(0).abs().sum()) > 0


@pytest.mark.parametrize(
    "change",
    [
        {"columns": ["KMID", "MA5"]},
        {"columns": ["KMID", "MA5", "STD20"]},
        {"label": ["Ref($close, -3)/$close - 1"]},
        {"start_time": "2018-03-05"},
        {"end_time": "2018-11-29"},
        {"filter_pipe": [{"filter_type": "NameDFilter", "name_rule_re": "S[1-5]"}]},
    ],
)
def test_options_that_change_the_values_change_the_key(market, folder, change):
    if "filter_pipe" in change:
        rule = {"_target_": "qtorch.data.handler.filter.NameDFilter", "name_rule_re": "S[1-5]"}
        change = {"filter_pipe": [rule]}
    handler(market, folder).view("raw")
    changed_handler = handler(market, folder, **change)
    uncached_handler = handler(market, False, **change)
    assert_frames_equal(
        changed_handler.fetch(data_key="raw"), uncached_handler.fetch(data_key="raw")
    )
    assert len(FeatureCache(folder).entries()) == 2


def test_options_that_keep_the_values_keep_the_key(market, folder, tmp_path):
    handler(market, folder).view("raw")
    # An end on a weekend, another type of date, other processors, another folder of the data.
    copy = shutil.copytree(market, tmp_path / "elsewhere")
    handler(market, folder, end_time="2018-12-02").view("raw")
    handler(market, folder, start_time=pd.Timestamp("2018-03-01")).view("raw")
    handler(market, folder, infer_processors=["Fillna"]).view("raw")
    handler(copy, folder).view("raw")
    assert len(FeatureCache(folder).entries()) == 1


def test_changed_bars_change_the_key(market, folder, tmp_path):
    copy = shutil.copytree(market, tmp_path / "copy")
    before = handler(copy, folder).fetch(data_key="raw")
    path = copy / "features" / "s3" / "close.day.bin"
    close_values = np.fromfile(path, dtype="<f4")
    close_values[1:] *= 1.01
    close_values[40] *= 1.5
    close_values.tofile(path)
    after = handler(copy, folder).fetch(data_key="raw")
    assert not before.equals(after)
    assert_frames_equal(after, handler(copy, False).fetch(data_key="raw"))


def test_inst_processors_run_after_the_cache(market, folder):
    calls = []

    def double(frame, instrument):
        calls.append(instrument)
        return frame * 2

    loader = {"feature": ["$close"], "label": ["Ref($close, -2)/Ref($close, -1) - 1"]}
    frames = [
        DataHandlerLP(
            "stocks",
            data_loader=QlibDataLoader(loader, inst_processors=inst),
            source=str(market),
            cache=folder,
        ).fetch(data_key="raw", col_set="feature")
        for inst in (None, [double])
    ]
    assert_frames_equal(frames[0] * 2, frames[1])
    assert len(set(calls)) == 8
    assert len(FeatureCache(folder).entries()) == 1


class UserLoader(QlibDataLoader):
    def compute_columns(self, group, bars, span, expressions):
        return super().compute_columns(group, bars, span, expressions)


def test_a_user_defined_loader_is_not_cached(market, folder, caplog):
    caplog.set_level("INFO")
    loader = UserLoader({"feature": ["$close"]})
    DataHandlerLP("stocks", data_loader=loader, source=str(market), cache=folder).view("raw")
    assert FeatureCache(folder).entries() == []
    assert "not cached: UserLoader.compute_columns computes them" in caplog.text


def test_errors_are_raised_and_leave_no_entry(market, folder):
    with pytest.raises(DataError, match="no trading day"):
        handler(market, folder, start_time="2030-01-01", end_time=None).view("raw")
    with pytest.raises(DataError, match="universe"):
        Alpha158("stokcs", source=str(market), cache=folder).view("raw")
    assert [p.name for p in folder.glob("*")] == [p.name for p in folder.glob(".lock-*")]


# -- size limit and failures------------------------------------------------------------------------


def make_view(value: float, size: int = 64) -> View:
    values = torch.full((size, 4, 4), value)
    panel = Panel(values, pd.bdate_range("2020-01-01", periods=size), list("ABCD"), list("wxyz"))
    return View({"feature": PanelColumns(panel)}, panel.mask, panel.mask)


def read_value(view: View) -> float:
    return float(view.groups["feature"].plain_panel().values[3, 2, 1])


def test_the_least_recently_used_entries_are_evicted(folder):
    size = entry_size(FeatureCache(folder), "probe")
    cache = FeatureCache(folder, max_bytes=int(3.5 * size))
    cache.clear()
    for k, key in enumerate(("a", "b", "c")):
        cache.get(key, {}, compute=lambda k=k: make_view(float(k)))
        os.utime(folder / key / "meta.json", (1000 + k, 1000 + k))
    # This use makes b the oldest entry.
    cache.get("a", {}, compute=lambda: pytest.fail("a is cached"))
    evicted_view = cache.get("b", {}, compute=lambda: pytest.fail("b is cached"))
    os.utime(folder / "b" / "meta.json", (1000, 1000))
    cache.get("d", {}, compute=lambda: make_view(3.0))
    assert {e.key for e in cache.entries()} == {"a", "c", "d"}
    assert read_value(evicted_view) == 1.0  # an evicted view stays readable
    assert sum(e.num_bytes for e in cache.entries()) <= cache.max_bytes


def entry_size(cache: FeatureCache, key: str) -> int:
    cache.get(key, {}, compute=lambda: make_view(0.0))
    return cache.entries()[0].num_bytes


def test_features_larger_than_the_cache_are_computed_without_caching(folder):
    cache = FeatureCache(folder, max_bytes=100)
    assert read_value(cache.get("a", {}, compute=lambda: make_view(7.0))) == 7.0
    assert cache.entries() == []
    assert [p for p in folder.iterdir() if not p.name.startswith(".lock")] == []


@pytest.mark.parametrize("damage", ["cut", "gone", "meta", "arrays"])
def test_a_damaged_entry_is_recomputed(folder, damage, caplog):
    cache = FeatureCache(folder)
    cache.get("a", {}, compute=lambda: make_view(1.0))
    entry = folder / "a"
    match damage:
        case "cut":
            os.truncate(entry / "0.f32", 100)
        case "gone":
            (entry / "0.f32").unlink()
        case "meta":
            (entry / "meta.json").write_text("{")
        case "arrays":
            os.truncate(entry / "arrays.npz", 50)
    assert read_value(cache.get("a", {}, compute=lambda: make_view(2.0))) == 2.0
    assert read_value(cache.get("a", {}, compute=lambda: pytest.fail("a is cached"))) == 2.0


def test_a_full_disk_only_disables_caching(folder, monkeypatch, caplog):
    from qtorch.data.handler import feature_cache

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_cache, "write_view", full)
    cache = FeatureCache(folder)
    assert read_value(cache.get("a", {}, compute=lambda: make_view(4.0))) == 4.0
    assert "No space left" in caplog.text
    assert [p for p in folder.iterdir() if not p.name.startswith(".lock")] == []


def test_a_folder_that_cannot_be_created_only_disables_caching(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = FeatureCache(tmp_path / "file" / "features")
    assert read_value(cache.get("a", {}, compute=lambda: make_view(4.0))) == 4.0
    assert cache.entries() == []
    assert cache.clear() == 0


def test_stale_temporary_folders_are_removed(folder):
    cache = FeatureCache(folder)
    cache.get("a", {}, compute=lambda: make_view(1.0))
    old, new = folder / ".part-old", folder / ".part-new"
    for part in (old, new):
        part.mkdir()
        (part / "0.f32").write_bytes(b"half")
    os.utime(old, (0, 0))
    cache.get("b", {}, compute=lambda: make_view(1.0))
    assert not old.exists()
    assert new.exists()
    assert cache.clear() == 2
    assert not new.exists()


@pytest.mark.parametrize(
    ("text", "expected_bytes"), [("20G", 20 * 2**30), ("1.5 MiB", 1572864), ("7", 7)]
)
def test_the_maximum_size_comes_from_the_environment(monkeypatch, text, expected_bytes):
    monkeypatch.setenv(BYTES_VARIABLE, text)
    assert FeatureCache().max_bytes == expected_bytes
    monkeypatch.setenv(BYTES_VARIABLE, "much")
    with pytest.raises(ConfigError, match="such as 20G"):
        FeatureCache()


def test_the_default_folder_is_in_qtorchs_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QTORCH_CACHE", str(tmp_path))
    with use_feature_cache(True):
        assert FeatureCache().folder == tmp_path / "features"


# -- concurrency -----------------------------------------------------------------------------------


def test_threads_share_one_computation(folder):
    computations, values = [], []

    def compute():
        computations.append(1)
        time.sleep(0.2)
        return make_view(5.0)

    def get():
        values.append(read_value(FeatureCache(folder).get("a", {}, compute=compute)))

    threads = [threading.Thread(target=get) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert values == [5.0] * 6
    assert len(computations) == 1


def test_the_key_depends_on_the_code_that_computes_features():
    folder = Path(feature_cache.__file__).parents[1]
    names = {p.relative_to(folder).as_posix() for p in feature_cache.engine_files(folder)}
    assert all(list(folder.glob(pattern)) for pattern in feature_cache.ENGINE_PATTERNS)
    assert {"expression/rolling.py", "panel/panel.py", "source/qlib.py"} <= names


WORK = """
import os, sys, time
from pathlib import Path
import test_feature_cache as tests
from qtorch.data.handler.feature_cache import FeatureCache
folder, log, pause = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
def compute():
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(pause)
    return tests.make_view(6.0)
print(tests.read_value(FeatureCache(folder).get("a", {}, compute=compute)), flush=True)
"""


def start(folder, log, pause) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WORK, str(folder), str(log), str(pause)],
        cwd=Path(__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_one_process_computes_while_the_others_wait(folder, tmp_path):
    log = tmp_path / "log"
    children = [start(folder, log, 1.5) for _ in range(3)]
    assert [child.communicate(timeout=120)[0].strip() for child in children] == ["6.0"] * 3
    assert len(log.read_text().splitlines()) == 1


@pytest.mark.slow
def test_another_process_takes_over_from_a_killed_one(folder, tmp_path):
    log = tmp_path / "log"
    first = start(folder, log, 600)
    end = time.monotonic() + 60
    while not log.exists() and time.monotonic() < end:
        time.sleep(0.05)
    second = start(folder, log, 0)
    time.sleep(1.0)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert second.communicate(timeout=60)[0].strip() == "6.0"
    assert len(log.read_text().splitlines()) == 2
    assert [e.key for e in FeatureCache(folder).entries()] == ["a"]


# -- the command -----------------------------------------------------------------------------------


def test_the_command_lists_removes_and_clears_entries(market, folder, capsys):
    from qtorch.cli.main import main

    handler(market, folder).view("raw")
    handler(market, folder, columns=["KMID"]).view("raw")
    folder_option = f"folder={folder}"
    keys = [e.key for e in FeatureCache(folder).entries()]
    assert main(["data", "cache", folder_option]) == 0
    out = capsys.readouterr().out
    assert all(key in out for key in keys)
    assert "2 entries" in out
    assert "QlibSource" in out
    assert main(["data", "cache", "remove", keys[0][:8], folder_option]) == 0
    assert [e.key for e in FeatureCache(folder).entries()] == keys[1:]
    assert main(["data", "cache", "remove", "zzz", folder_option]) == 1
    assert "no entry starts" in capsys.readouterr().err
    assert main(["data", "cache", "clear", folder_option]) == 0
    assert "1 entry removed" in capsys.readouterr().out
    assert main(["data", "cache", "cler", folder_option]) == 1
    assert "Did you mean 'clear'" in capsys.readouterr().err


def test_the_cache_option_is_stored_but_is_not_part_of_the_fit_id(market, folder):
    from qtorch.core.identity import fit_id

    plain_handler, cached_handler = handler(market, False), handler(market, str(folder))
    configs = [{"dataset": {"handler": h.to_config()}} for h in (plain_handler, cached_handler)]
    assert configs[1]["dataset"]["handler"]["cache"] == str(folder)
    assert fit_id(configs[0], "data") == fit_id(configs[1], "data")
    assert json.dumps(configs)


def test_cached_features_need_no_bars_from_the_source(market, folder, monkeypatch):
    handler(market, folder).view("raw")
    reads = []
    real = QlibSource.read_bars
    monkeypatch.setattr(
        QlibSource, "read_bars", lambda self, *a, **k: reads.append(1) or real(self, *a, **k)
    )
    handler(market, folder).view("infer")
    assert reads == []
