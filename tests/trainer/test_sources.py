"""Find the user's source files that a task depends on, without importing them."""

from __future__ import annotations

import sys
import types
from types import ModuleType

import pytest

from qtorch.data import DatasetH
from qtorch.data.expression import register_operator, unregister_operator
from qtorch.trainer.provenance import collect_source_digests

FILES = {
    "own_package/__init__.py": "",
    "own_package/net.py": "import numpy as np\nfrom . import parts\nfrom .sizes import WIDE\n",
    "own_package/parts.py": "import torch\nimport own_loss\n",
    "own_package/sizes.py": "WIDE = 8\n",
    "own_package/unused.py": "",
    "own_loss.py": "def late():\n    from own_package import parts\n",
    "lone.py": "import own_signs  # does not exist\n",
}


@pytest.fixture
def user_folder(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_digests_cover_named_modules_and_their_imports(user_folder):
    lone = str(user_folder / "lone.py")
    task = {
        "model": {"_target_": "qtorch.model.LightningModel", "network": "own_package.net.Net"},
        "dataset": {"class": "Data", "module_path": lone, "kwargs": {"path": "own/data.csv"}},
        "record": ["SignalRecord", {"func": "made", "module_path": "own_loss"}],
        "seed": 3,
    }
    digests = collect_source_digests(task)
    names = ("own_package", "own_package.net", "own_package.parts", "own_package.sizes")
    assert digests.keys() == {*names, "own_loss", lone}
    assert not {"own_package", "own_loss"} & sys.modules.keys()
    assert collect_source_digests(task) == digests
    (user_folder / "own_package/sizes.py").write_text("WIDE = 9\n")
    changed_digests = collect_source_digests(task)
    assert [k for k in digests if digests[k] != changed_digests[k]] == ["own_package.sizes"]


def test_modules_without_a_file_have_no_digest(user_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "by_hand", ModuleType("by_hand"))
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    net_class = type("Net", (), {"__module__": "__main__"})
    task = {"model": net_class(), "loss": "by_hand.Loss", "dataset": DatasetH, "rate": 0.1}
    assert collect_source_digests(task) == {"__main__": None, "by_hand": None}


def test_digests_cover_the_modules_of_operators_in_expressions(user_folder):
    operator = types.FunctionType((lambda x: x).__code__, {"__name__": "own_loss"}, "Own")
    register_operator("Own", operator, arguments=("series",))
    try:
        task = {"dataset": {"config": {"feature": ["$open", "Own($close) / 2"]}}}
        assert "own_loss" in collect_source_digests(task)
        assert collect_source_digests({"dataset": {"feature": ["Mean($close, 2)"]}}) == {}
    finally:
        unregister_operator("Own")
