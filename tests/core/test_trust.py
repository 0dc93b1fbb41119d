from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from qtorch.core.errors import DataError, TrustError
from qtorch.core.session import session_context
from qtorch.core.trust import check_config, check_name, load_pickle


class Evil:
    def __reduce__(self):
        return (os.system, ("true",))


class Nested:
    """A torch storage whose own file would run code."""

    def __reduce__(self):
        inner = io.BytesIO()
        torch.save(Evil(), inner)
        return (torch.storage._load_from_bytes, (inner.getvalue(),))


def test_plain_values_and_tensors_pass():
    value = {"a": np.arange(3), "b": torch.ones(2, 2), "c": OrderedDict(x=1), "d": {1, 2}}
    back = load_pickle(pickle.dumps(value))
    assert back["b"].sum() == 4
    assert back["a"].tolist() == [0, 1, 2]
    layer = load_pickle(pickle.dumps(torch.nn.Linear(2, 1)))
    assert isinstance(layer, torch.nn.Linear)


@pytest.mark.parametrize("thing", [Evil(), Nested()])
def test_code_does_not_run(thing):
    with pytest.raises((TrustError, DataError)):
        load_pickle(pickle.dumps(thing))


def test_an_untrusted_module_is_not_even_imported(tmp_path, monkeypatch):
    (tmp_path / "surprise.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass A: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    stored = b"csurprise\nA\n."
    with pytest.raises(TrustError, match="'surprise' is not trusted"):
        load_pickle(stored)
    with pytest.raises(TrustError):
        check_name("surprise.A")
    assert not (tmp_path / "ran").exists()
    with session_context(trusted=("surprise",)):
        assert load_pickle(stored).__name__ == "A"


def test_the_environment_trusts_too(monkeypatch):
    monkeypatch.setenv("QTORCH_TRUSTED", "a.b, os")
    check_name("os.system")
    with pytest.raises(TrustError):
        check_name("a.bc.d")


def test_configurations_are_walked():
    check_config({"_target_": "torch.optim.Adam", "parts": [{"class": "torch.nn.Linear"}]})
    with pytest.raises(TrustError, match="not of a kind"):
        check_config({"a": [{"func": "torch.hub.load"}]})
    with pytest.raises(TrustError, match="which is code"):
        check_config({"class": "A", "module_path": "x.py"})


def test_a_damaged_pickle_says_so(tmp_path: Path):
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x04not a pickle")
    with pytest.raises(DataError, match=r"x\.pkl cannot be read"):
        load_pickle(path)


def test_classes_of_a_trusted_file_come_back_in_another_process(tmp_path: Path):
    code = tmp_path / "own.py"
    code.write_text("class Own:\n    value = 3\n")
    save = (
        "import sys, pickle; from qtorch.core.names import load_module;"
        f"pickle.dump(load_module({str(code)!r}).Own(), open({str(tmp_path / 'own.pkl')!r}, 'wb'))"
    )
    subprocess.run([sys.executable, "-c", save], check=True)
    with pytest.raises(TrustError, match="own_"):
        load_pickle(tmp_path / "own.pkl")
    with session_context(trusted=[str(code)]):
        assert load_pickle(tmp_path / "own.pkl").value == 3
