"""Imports: without garbage collections, and none that a command does not need."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import gc, weakref
from qtorch.core.lazy import quick_imports

class Node: pass

collections = []
gc.callbacks.append(lambda phase, details: collections.append(phase))
with quick_imports(freeze=True):
    node = Node()
    reference = weakref.ref(node)
    objects = [[] for _ in range(100_000)]
    import decimal
assert not collections
assert gc.isenabled() and gc.get_freeze_count() > 100_000
del node
assert reference() is None  # reference counts still free what exists
count = gc.get_freeze_count()
with quick_imports(freeze=True):
    import decimal  # is there already
    objects = [[] for _ in range(100_000)]
assert gc.get_freeze_count() <= count
with quick_imports():
    import fractions
assert gc.get_freeze_count() <= count  # only if asked for
gc.disable()
with quick_imports(freeze=True):
    pass
assert not gc.isenabled()
"""

LINEAR = """
import sys
import qtorch.cli.train, qtorch.cli.workflow.command
import qtorch.record.portfolio, qtorch.record.signal, qtorch.tracking.mlflow_store
from qtorch.data import Alpha158, DatasetH, QlibSource
from qtorch.model import DEnsembleModel, LGBModel, LinearModel
from qtorch.trainer import task_train

for name in ("pytorch_lightning", "torchmetrics", "torch._dynamo", "matplotlib.figure"):
    assert name not in sys.modules, name
"""


@pytest.mark.slow
def test_models_without_a_network_import_no_lightning():
    subprocess.run([sys.executable, "-c", LINEAR], check=True)


def test_imports_cause_no_garbage_collection():
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)


def test_commands_import_quickly(monkeypatch, capsys):
    import gc

    from qtorch.cli.main import main

    enabled_states = []
    monkeypatch.setattr(
        "qtorch.cli.main.importlib.import_module",
        lambda name: enabled_states.append(gc.isenabled()),
    )
    main(["runs"])
    assert enabled_states == [False]
    assert gc.isenabled()
