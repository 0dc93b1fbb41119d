"""`import qlib` finds qtorch after one explicit line."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest

import qtorch
from qtorch.compat import qlib as compat
from qtorch.core.errors import ConfigError
from qtorch.core.session import session


@pytest.fixture
def qlib_names(monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "qlib"]:
        monkeypatch.delitem(sys.modules, name)
    compat.install()
    yield
    compat.uninstall()


def test_names_of_qlib_are_ours(qlib_names, tmp_path):
    qlib = importlib.import_module("qlib")
    workflow = importlib.import_module("qlib.workflow")
    assert workflow.R is qtorch.R
    assert importlib.import_module("qlib.data.dataset").DatasetH is qtorch.data.DatasetH
    assert importlib.import_module("qlib.model.trainer").task_train is qtorch.trainer.task_train
    region = importlib.import_module("qlib.constant").REG_CN
    qlib.init(provider_uri=str(tmp_path), region=region, kernels=1)
    assert session().region == "cn"
    assert session().provider_uri == str(tmp_path)
    with pytest.raises(ConfigError, match="Did you mean 'region'"):
        qlib.init(regon="cn")
    executor = importlib.import_module("qlib.backtest.executor")
    with pytest.raises(ImportError, match="no nested execution"):
        _ = executor.NestedExecutor
    with pytest.raises(ImportError, match=r"Did you mean 'qlib\.data\.dataset\.DatasetH'"):
        _ = importlib.import_module("qlib.data.dataset").DatasetHX
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("qlib.nowhere")


def test_it_is_undone_and_never_replaces_real_qlib(qlib_names, monkeypatch):
    importlib.import_module("qlib.workflow")
    compat.uninstall()
    assert "qlib.workflow" not in sys.modules
    monkeypatch.setitem(sys.modules, "qlib", ModuleType("qlib"))
    with pytest.raises(ConfigError, match="real Qlib already"):
        compat.install()
