"""The trust rule for names in pickles and configurations."""

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
from qtorch.core.trust import check_config_trust, check_name_trust, load_pickle


class Malicious:
    def __reduce__(self):
        return (os.system, ("true",))


class MaliciousStorage:
    """A torch storage whose embedded file would run code."""

    def __reduce__(self):
        inner = io.BytesIO()
        torch.save(Malicious(), inner)
        return (torch.storage._load_from_bytes, (inner.getvalue(),))


def test_plain_values_and_tensors_are_trusted():
    value = {"a": np.arange(3), "b": torch.ones(2, 2), "c": OrderedDict(x=1), "d": {1, 2}}
    result = load_pickle(pickle.dumps(value))
    assert result["b"].sum() == 4
    assert result["a"].tolist() == [0, 1, 2]
    layer = load_pickle(pickle.dumps(torch.nn.Linear(2, 1)))
    assert isinstance(layer, torch.nn.Linear)


@pytest.mark.parametrize("malicious", [Malicious(), MaliciousStorage()])
def test_malicious_pickle_does_not_run_code(malicious):
    with pytest.raises((TrustError, DataError)):
        load_pickle(pickle.dumps(malicious))


def test_untrusted_module_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "surprise.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass A: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    data = b"csurprise\nA\n."
    with pytest.raises(TrustError, match="'surprise' is not trusted"):
        load_pickle(data)
    with pytest.raises(TrustError):
        check_name_trust("surprise.A")
    assert not (tmp_path / "ran").exists()
    with session_context(trusted=("surprise",)):
        assert load_pickle(data).__name__ == "A"


def test_packages_of_the_environment_variable_are_trusted(monkeypatch):
    monkeypatch.setenv("QTORCH_TRUSTED", "a.b, os")
    check_name_trust("os.system")
    with pytest.raises(TrustError):
        check_name_trust("a.bc.d")


def test_nested_names_of_a_configuration_are_checked():
    check_config_trust({"_target_": "torch.optim.Adam", "parts": [{"class": "torch.nn.Linear"}]})
    with pytest.raises(TrustError, match="not of a type"):
        check_config_trust({"a": [{"func": "torch.hub.load"}]})
    with pytest.raises(TrustError, match="which is code"):
        check_config_trust({"class": "A", "module_path": "x.py"})
    with session_context(trusted=("x.py",)):
        check_config_trust({"class": "A", "module_path": "x.py"})
        with pytest.raises(TrustError, match="'os' is not trusted"):  # a dotted name ignores it
            check_config_trust({"func": "os.system", "module_path": "x.py"})


def test_damaged_pickle_raises_data_error(tmp_path: Path):
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x04not a pickle")
    with pytest.raises(DataError, match=r"x\.pkl cannot be read"):
        load_pickle(path)


def test_class_of_a_trusted_file_is_loaded_in_another_process(tmp_path: Path):
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
