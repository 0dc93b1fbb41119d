"""The feature cache: equal values, one computation, a bounded size, safe under failures."""

from __future__ import annotations

import importlib
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

from qtorch.core import source_files
from qtorch.core.errors import ConfigError, DataError
from qtorch.data import Alpha158, Alpha360, DataHandlerLP, TSDatasetH
from qtorch.data.expression import register_operator, unregister_operator
from qtorch.data.handler import code_digest, feature_cache
from qtorch.data.handler.feature_cache import BYTES_VARIABLE, FeatureCache, use_feature_cache
from qtorch.data.handler.loader import QlibDataLoader
from qtorch.data.panel.columns import PanelColumns
from qtorch.data.panel.panel import Panel
from qtorch.data.panel.stored_view import BLOCK_BYTES, checksum
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


def test_infinite_bars_stay_an_error_without_a_processor_for_them(market, folder, tmp_path):
    copy = shutil.copytree(market, tmp_path / "copy")
    path = copy / "features" / "s3" / "close.day.bin"
    close_values = np.fromfile(path, dtype="<f4")
    close_values[40] = np.inf
    close_values.tofile(path)
    handler(copy, folder, infer_processors=["ProcessInf"]).view("raw")
    assert len(FeatureCache(folder).entries()) == 1
    with pytest.raises(DataError, match="infinite"):  # although the features are cached
        handler(copy, folder).view("raw")


@pytest.fixture
def changing_market(market, tmp_path, monkeypatch) -> Path:
    """A copy of the market whose bars change each time that they are read."""
    copy = shutil.copytree(market, tmp_path / "copy")
    read_bars = QlibSource.read_bars

    def change_bars(self, *arguments):
        bars = read_bars(self, *arguments)
        path = copy / "features" / "s3" / "close.day.bin"
        close_values = np.fromfile(path, dtype="<f4")
        close_values[40] *= 1.5
        close_values.tofile(path)
        return bars

    monkeypatch.setattr(QlibSource, "read_bars", change_bars)
    return copy


def test_features_of_data_that_changes_meanwhile_are_not_cached(changing_market, folder, caplog):
    handler(changing_market, folder).view("raw")
    assert FeatureCache(folder).entries() == []
    assert "the data changed while they were computed" in caplog.text


def test_data_that_changes_while_a_handler_loads_it_at_once_is_an_error(changing_market):
    handler(changing_market, False).view("raw")
    with pytest.raises(DataError, match="the data changed while Alpha158 loaded it"):
        handler(changing_market, False, init_data=True)


def test_source_reads_a_changed_universe_again(market, folder, tmp_path):
    copy = shutil.copytree(market, tmp_path / "copy")
    source = QlibSource(copy)
    first = Alpha158("stocks", source=source, columns=COLUMNS, cache=folder).fetch(data_key="raw")
    path = copy / "instruments" / "stocks.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    for cache in (folder, False):
        options = {"source": source, "columns": COLUMNS, "cache": cache}
        frame = Alpha158("stocks", **options).fetch(data_key="raw")
        assert frame.index.get_level_values("instrument").nunique() == 4
    assert first.index.get_level_values("instrument").nunique() == 8


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
    def __init__(self, config, helper=None):
        super().__init__(config)
        self.helper = helper

    def compute_columns(self, group, bars, span, expressions):
        return super().compute_columns(group, bars, span, expressions)


def test_live_object_in_a_user_loader_prevents_caching(market, folder, caplog):
    caplog.set_level("INFO")
    loader = UserLoader({"feature": ["$close"]}, helper=threading.Lock())
    DataHandlerLP("stocks", data_loader=loader, source=str(market), cache=folder).view("raw")
    assert FeatureCache(folder).entries() == []
    assert "not cached: a UserLoader['helper'] is a live lock" in caplog.text


def test_attributes_of_a_user_loader_are_part_of_the_key(market, folder):
    for helper in (1, 2, 1):
        loader = UserLoader({"feature": ["$close"]}, helper=helper)
        DataHandlerLP("stocks", data_loader=loader, source=str(market), cache=folder).view("raw")
    assert len(FeatureCache(folder).entries()) == 2


def test_key_leaves_out_only_attributes_that_every_loader_has():
    assert vars(QlibDataLoader(["$close"])).keys() == feature_cache.LOADER_ATTRIBUTES


PARTS_SOURCE = """
import own_far

SCALE = 1.0

def scaled(x):
    return x * SCALE
"""
FAR_SOURCE = "def shifted(x):\n    return x + 0.0\n"
CODE_SOURCE = """
import own_parts
from own_parts import scaled
from qtorch.data import ExpressionDFilter, QlibDataLoader, SyntheticSource, register_operator

OFFSET = 0.0

def halved(x):
    return x / 2

def late(x):
    from own_far import shifted
    return shifted(x)

def make(value):
    def function(x, window):
        return late(own_parts.scaled(halved(x))) + OFFSET + value
    return function

register_operator("Own", make(0.0), replace=True)

class Loader(QlibDataLoader):
    def compute_columns(self, group, bars, span, expressions, mask_bars=None):
        columns = QlibDataLoader.compute_columns(self, group, bars, span, expressions, mask_bars)
        columns.plain_panel().values.mul_(self.factor())
        return columns

    def factor(self):
        return 2.0

class Filter(ExpressionDFilter):
    def passes(self, bars):
        return super().passes(bars)

class Source(SyntheticSource):
    def read_bars(self, *args):
        bars = super().read_bars(*args)
        return type(bars)(bars.values * 1.0, bars.spans)
"""
ABOVE_MEDIAN = "bars.mask & (bars.values[..., 0] > bars.values[..., 0].nanmedian())"
CODE_FILES = {"own_code.py": CODE_SOURCE, "own_parts.py": PARTS_SOURCE, "own_far.py": FAR_SOURCE}


@pytest.fixture
def user_code(tmp_path, monkeypatch):
    """A function that writes user modules with one text replaced, and imports them anew."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def load(text: str = "", replacement: str = ""):
        for name, source in CODE_FILES.items():
            (tmp_path / name).write_text(source.replace(text, replacement) if text else source)
        importlib.invalidate_caches()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        for name in CODE_FILES:
            sys.modules.pop(name.removesuffix(".py"), None)
        return importlib.import_module("own_code")

    yield load
    unregister_operator("Own")
    for name in CODE_FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


def load_own(code, kind, market, folder) -> pd.DataFrame:
    source = code.Source(8, "2018-01-01", "2018-12-31", num_sectors=2, seed=1)
    loader = {
        "operator": lambda: QlibDataLoader(["Own($close, 3)"]),
        "loader": lambda: code.Loader(["$close"]),
        "filter": lambda: QlibDataLoader(["$close"], filter_pipe=[code.Filter("$close > 0")]),
        "source": lambda: QlibDataLoader(["$close"]),
    }[kind]()
    handler = DataHandlerLP(
        "stocks",
        data_loader=loader,
        source=source if kind == "source" else str(market),
        cache=folder,
    )
    return handler.fetch(data_key="raw")


@pytest.mark.parametrize(
    ("kind", "text", "replacement"),
    [
        pytest.param("operator", "+ OFFSET", "- OFFSET - 1", id="body"),
        pytest.param("operator", "x / 2", "x / 4", id="function of the same module"),
        pytest.param("operator", "OFFSET = 0.0", "OFFSET = 1.0", id="global"),
        pytest.param("operator", "make(0.0)", "make(1.0)", id="closure"),
        pytest.param("operator", "SCALE = 1.0", "SCALE = 3.0", id="global of another module"),
        pytest.param("operator", "x + 0.0", "x + 1.0", id="import inside a function"),
        pytest.param("loader", "return 2.0", "return 3.0", id="loader"),
        pytest.param("filter", "super().passes(bars)", ABOVE_MEDIAN, id="filter"),
        pytest.param("source", "* 1.0, bars.spans", "* 2.0, bars.spans", id="source"),
    ],
)
def test_changed_user_code_changes_the_key(
    market, folder, user_code, kind, text, replacement, monkeypatch
):
    first = load_own(user_code(), kind, market, folder)
    with monkeypatch.context() as patch:
        patch.setattr(QlibDataLoader, "_compute_view", None)  # computing would fail
        assert_frames_equal(load_own(user_code(), kind, market, folder), first)
    code = user_code(text, replacement)
    changed = load_own(code, kind, market, folder)
    assert not changed.equals(first)
    assert_frames_equal(changed, load_own(code, kind, market, False))


def test_values_that_change_without_an_edit_change_the_key(market, folder, user_code):
    code = user_code()

    def make_with_default(value):
        def function(x, window, added=value, *, factor=1.0):
            return x * factor + added

        return function

    function = make_with_default(1.0)

    def register(value):
        return lambda: register_operator("Own", value, arguments=("series", "window"), replace=True)

    changes = (
        lambda: setattr(code, "OFFSET", 1.0),
        lambda: setattr(code, "halved", lambda x: x),
        lambda: setattr(code, "halved", lambda x: x * 3),  # the code alone differs
        lambda: setattr(code.own_parts, "SCALE", 5.0),
        register(code.make(2.0)),
        register(code.make(3.0)),  # the closure alone differs
        register(function),
        lambda: setattr(function, "__defaults__", (2.0,)),
        lambda: setattr(function, "__kwdefaults__", {"factor": 2.0}),
    )
    first = load_own(code, "operator", market, folder)
    for change in changes:
        change()
        changed = load_own(code, "operator", market, folder)
        assert not changed.equals(first)
        assert_frames_equal(changed, load_own(code, "operator", market, False))
        first = changed


def test_methods_that_change_without_an_edit_change_the_key(market, folder, user_code):
    def above_median(self, bars):
        return bars.mask & (bars.values[..., 0] > bars.values[..., 0].nanmedian())

    def read_doubled_bars(self, *arguments):
        bars = SyntheticSource.read_bars(self, *arguments)
        return type(bars)(bars.values * 2.0, bars.spans)

    code = user_code()
    for kind, owner, name, method in (
        ("loader", code.Loader, "factor", lambda self: 7.0),
        ("filter", code.Filter, "passes", above_median),
        ("source", code.Source, "read_bars", read_doubled_bars),
    ):
        first = load_own(code, kind, market, folder)
        setattr(owner, name, method)
        changed = load_own(code, kind, market, folder)
        assert not changed.equals(first)
        assert_frames_equal(changed, load_own(code, kind, market, False))


def test_unused_operators_are_not_part_of_the_key(market, folder, user_code):
    user_code()
    handler(market, folder).view("raw")
    user_code("x / 2", "x / 4")
    handler(market, folder).view("raw")
    assert len(FeatureCache(folder).entries()) == 1


def test_operators_that_no_hash_identifies_prevent_caching(market, folder, caplog):
    caplog.set_level("INFO")
    network = torch.nn.Linear(1, 1)
    namespace: dict = {}
    exec("def doubled(x):\n    return x * 2", namespace)
    for function, problem in (
        (lambda x: x + network.bias.detach(), "network is a live Linear"),
        (namespace["doubled"], "belongs to no module"),
        (torch.jit.script(double_values), "is a live ScriptFunction"),
    ):
        register_operator("Live", function, arguments=("series",), replace=True)
        try:
            loader = QlibDataLoader(["Live($close)"])
            DataHandlerLP("stocks", data_loader=loader, source=str(market), cache=folder).view()
        finally:
            unregister_operator("Live")
        assert "not cached: operator Live" in caplog.text
        assert problem in caplog.text
    assert FeatureCache(folder).entries() == []


def double_values(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def test_versions_of_libraries_and_of_qtorch_are_part_of_the_key(market, folder, monkeypatch):
    first = feature_cache.engine_digest()
    for module in (torch, np, pd):
        with monkeypatch.context() as patch:
            patch.setattr(module, "__version__", "1.0")
            assert feature_cache.engine_digest() != first
    for part in ("data", "core"):
        with monkeypatch.context() as patch:
            patch.setattr(feature_cache, "package_digest", lambda name, part=part: name == part)
            handler(market, folder).view("raw")
    assert feature_cache.engine_digest() == first
    assert len(FeatureCache(folder).entries()) == 2


def test_versions_of_packages_that_user_code_calls_are_part_of_the_key(monkeypatch):
    function = {"function": lambda x: pd.DataFrame(x)}
    first = code_digest.code_digest(function)
    assert code_digest.code_digest(function) == first
    monkeypatch.setattr(code_digest, "library_version", lambda module: "another")
    assert code_digest.code_digest(function) != first


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


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def edit_meta(entry: Path, **changes) -> None:
    meta = json.loads((entry / "meta.json").read_text())
    (entry / "meta.json").write_text(json.dumps({**meta, **changes}))


def swap_blocks(entry: Path) -> None:
    content = (entry / "0.f32").read_bytes()
    (entry / "0.f32").write_bytes(content[512:1024] + content[:512] + content[1024:])


def copy_from_another_entry(entry: Path, name: str = "") -> None:
    FeatureCache(entry.parent).get("b", {}, compute=lambda: make_view(9.0))
    if name:
        shutil.copy(entry.parent / "b" / name, entry / name)
    else:
        shutil.rmtree(entry)
        shutil.copytree(entry.parent / "b", entry)


DAMAGES = {
    "values truncated": lambda entry: os.truncate(entry / "0.f32", 100),
    "first byte": lambda entry: flip_byte(entry / "0.f32", 0),
    "last byte": lambda entry: flip_byte(entry / "0.f32", -1),
    "blocks in another order": swap_blocks,
    "zeros": lambda entry: (entry / "0.f32").write_bytes(bytes(4 * 4 * 4 * 64)),
    "values missing": lambda entry: (entry / "0.f32").unlink(),
    "no json": lambda entry: (entry / "meta.json").write_text("{"),
    "edited meta": lambda entry: edit_meta(entry, instruments=list("BACD")),
    "arrays truncated": lambda entry: os.truncate(entry / "arrays.npz", 50),
    "byte of arrays": lambda entry: flip_byte(entry / "arrays.npz", 200),
    "older format": lambda entry: edit_meta(entry, format=1),
    "another entry": copy_from_another_entry,
    "file of another entry": lambda entry: copy_from_another_entry(entry, "0.f32"),
}


@pytest.fixture(params=DAMAGES)
def damage(request):
    return DAMAGES[request.param]


def make_distinct_view() -> View:
    view = make_view(1.0)
    values = view.groups["feature"].plain_panel().values
    values.copy_(torch.arange(values.numel()).view(values.shape))
    return view


def test_a_damaged_entry_is_recomputed(folder, damage, caplog):
    cache = FeatureCache(folder)
    cache.get("a", {}, compute=make_distinct_view)
    damage(folder / "a")
    assert read_value(cache.get("a", {}, compute=lambda: make_view(2.0))) == 2.0
    assert f"cannot use the cached features in {folder / 'a'}" in caplog.text
    assert read_value(cache.get("a", {}, compute=lambda: pytest.fail("a is cached"))) == 2.0


def test_checksum_notices_each_byte_and_the_length():
    content = torch.arange(BLOCK_BYTES * 2 + 100).remainder(251).to(torch.uint8)
    checksums = {checksum(content), checksum(content[:-1])}
    positions = (0, BLOCK_BYTES, 2 * BLOCK_BYTES - 1, 2 * BLOCK_BYTES, len(content) - 1)
    for position in positions:
        changed = content.clone()
        changed[position] ^= 1
        checksums.add(checksum(changed))
    assert len(checksums) == 2 + len(positions)


def test_verify_names_and_removes_damaged_entries(folder, damage, capsys):
    from qtorch.cli.main import main

    cache, words = FeatureCache(folder), ["data", "cache", "verify", f"folder={folder}"]
    for key in ("a", "good"):
        cache.get(key, {}, compute=make_distinct_view)
    assert main(words) == 0
    assert "0 of them damaged" in capsys.readouterr().out
    damage(folder / "a")
    assert main(words) == 1
    out = capsys.readouterr().out
    assert "removed a: " in out
    assert "removed good" not in out
    assert {e.key for e in cache.entries()} - {"b"} == {"good"}
    assert main(words) == 0


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


def test_the_digest_of_a_part_of_qtorch_covers_its_files(tmp_path, monkeypatch):
    folder = shutil.copytree(source_files.PACKAGE_FOLDER / "data", tmp_path / "data")
    monkeypatch.setattr(source_files, "PACKAGE_FOLDER", tmp_path)
    package_digest = source_files.package_digest.__wrapped__
    digests = [package_digest("data")]
    for name in ("expression/rolling.py", "panel/panel.py", "source/qlib.py"):
        (folder / name).write_text((folder / name).read_text() + "#")
        digests.append(package_digest("data"))
    assert len(set(digests)) == 4


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
