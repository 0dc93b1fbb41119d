"""Tests of qtorch.core.runtime: imports without garbage collections."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import gc, weakref
from qtorch.core.runtime import quick_imports

class Node: pass

collections = []
gc.callbacks.append(lambda phase, details: collections.append(phase))
with quick_imports():
    node = Node()
    reference = weakref.ref(node)
    objects = [[] for _ in range(100_000)]
    import decimal
assert not collections
assert gc.isenabled() and gc.get_freeze_count() > 100_000
del node
assert reference() is None  # reference counts still free what exists
count = gc.get_freeze_count()
with quick_imports():
    import decimal  # is there already
    objects = [[] for _ in range(100_000)]
assert gc.get_freeze_count() <= count
gc.disable()
with quick_imports():
    pass
assert not gc.isenabled()
"""


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
