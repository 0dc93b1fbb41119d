"""The trust rule for names in stored text, and for pickles."""

from __future__ import annotations

import copy
import os
import pickle
import re
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from qtorch.core.errors import ConfigError, DataError, TrustError
from qtorch.core.instantiate import init_instance_by_config
from qtorch.core.session import session_context
from qtorch.core.trust import StoredText, as_stored_text, check_config_trust, load_pickle, locate
from qtorch.data.processor.cross_section import CSRankNorm

UNTRUSTED = [
    "os.system",
    "posix.system",
    "subprocess.Popen",
    "builtins.eval",
    "builtins.exec",
    "importlib.import_module",
    "qtorch.core.names.importlib.import_module",
    "qtorch.core.trust.pickle.loads",
    "qtorch.core.trust.load_pickle",
    "qtorch.core.names.load_module",
    "qtorch.core.instantiate.init_instance_by_config",
    "qtorch.core.session.init",
    "qtorch.cli.main.main",
    "qtorch.__main__.main",
    "qtorch.process.fork_server.ForkServer",
    "qtorch.data.processor.cross_section.__builtins__",
    "torch.load",
    "torch.hub.load",
    "torch.jit.load",
    "torch.utils.cpp_extension.load",
    "torch.nn.Module.__init_subclass__",
    "torch.nn.modules.module.torch.load",
    "torch.optim.optimizer.functools.partial",
    "mlflow.pyfunc.load_model",
    "pandas.read_pickle",
    "numpy.load",
    "pytorch_lightning.callbacks.ModelCheckpoint",
    "pytorch_lightning.callbacks.LambdaCallback",
    "pytorch_lightning.Trainer",
    "hydra.utils.instantiate",
    "optuna.samplers.TPESampler",
    "${oc.env:HOME}",
    "${cmd}",
    "os.${name}",
    "os;system",
    "os.system()",
    "..os.system",
    "os..system",
    " os.system",
    "os.system\n",
    "a b.c",
    "/tmp/x.py",
    "",
    ".",
]
TRUSTED = [
    "torch.nn.Linear",
    "torch.nn.modules.loss.MSELoss",
    "torch.optim.Adam",
    "torch.optim.lr_scheduler.StepLR",
    "qtorch.data.processor.CSRankNorm",
    "qtorch.data.processor.cross_section.CSRankNorm",
    "qtorch.model.LightningModel",
    "qtorch.nn.LSTM",
    "pytorch_lightning.callbacks.EarlyStopping",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
]


@pytest.mark.parametrize("name", UNTRUSTED)
def test_stored_text_cannot_name_what_is_not_trusted(name):
    modules = set(sys.modules)
    for config in (name, {"_target_": name}, {"class": name}, {"func": name, "module_path": "os"}):
        with pytest.raises((TrustError, ConfigError)):
            init_instance_by_config(as_stored_text(config))
    new_packages = {m.partition(".")[0] for m in set(sys.modules) - modules}
    assert name.partition(".")[0] not in new_packages - {"qtorch", "torch", "pytorch_lightning"}


@pytest.mark.parametrize(
    "name",
    ["torch.nn.${name}", "torch.nn.Linear()", "torch.nn. Linear", "torch.nn..Linear", "${name}"],
)
def test_stored_text_that_is_no_name_is_refused_before_it_is_looked_for(name):
    for module in (None, "torch.nn"):
        with pytest.raises(TrustError, match="is not the name of an object"):
            locate(StoredText(name), module)


def test_private_classes_of_allowed_packages_are_refused():
    with pytest.raises(TrustError, match="not of a type"):  # although it is a network
        locate(StoredText("torch.nn.modules.batchnorm._BatchNorm"))


@pytest.mark.parametrize("name", TRUSTED)
def test_stored_text_can_name_the_parts_of_a_task(name):
    assert isinstance(locate(StoredText(name)), type)
    check_config_trust(as_stored_text({"a": [{"_target_": name}]}))


def test_bare_name_is_found_in_the_default_module_only():
    module = "qtorch.data.processor"
    assert locate(StoredText("CSRankNorm"), module) is CSRankNorm
    for name in ("system", "import_module"):
        with pytest.raises(ConfigError):
            locate(StoredText(name), module)
        with pytest.raises(ConfigError):
            locate(StoredText(name))
    with pytest.raises(TrustError):  # found there, but not of a kind that may be named
        locate(StoredText("read_csv"), "qtorch.core.tables")


def test_names_of_users_are_not_restricted():
    assert locate("os.system") is os.system
    assert init_instance_by_config({"_target_": "os.path.join", "_args_": ["a", "b"]}) == "a/b"
    check_config_trust({"_target_": "os.system"})


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c,
        copy.copy,
        copy.deepcopy,
        lambda c: {**c, "other": 1},
        lambda c: pickle.loads(pickle.dumps(c)),
        lambda c: dict(sorted(c.items())),
        lambda c: {k: v for k, v in c.items() if k != "cmd"},
    ],
)
def test_stored_text_keeps_its_type(change):
    config = change(as_stored_text({"_target_": "os.system", "command": "true"}))
    with pytest.raises(TrustError, match="os"):
        init_instance_by_config(config)


def test_nested_names_are_checked_wherever_they_stand():
    evil = {"_target_": "os.system", "command": "true"}
    for config in (
        {"_target_": "torch.nn.Sequential", "_args_": [evil]},
        {"_target_": "torch.nn.Linear", "in_features": {"deep": [evil]}, "out_features": 1},
        {"_target_": "torch.nn.Linear", "_partial_": True, "in_features": evil},
        {"class": "torch.nn.Sequential", "kwargs": {"x": [evil]}},
        {"class": "os.system", "kwargs": {"command": "true"}},
    ):
        with pytest.raises(TrustError, match="os"):
            check_config_trust(as_stored_text(config))
        with pytest.raises((TrustError, ConfigError)):
            init_instance_by_config(as_stored_text(config))


def test_what_counts_is_where_an_object_is_defined(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import os, functools\nfrom os import system\nfrom subprocess import Popen\n"
        "class Net:\n    pass\ndef go():\n    return 1\ndone = functools.partial(system, 'true')\n"
        "alias = functools.update_wrapper(functools.partial(system, 'true'), go)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TrustError, match=r"trusted=\['mine'\]"):
        locate(StoredText("mine.Net"))
    assert "mine" not in sys.modules  # not even imported
    with session_context(trusted=("mine",)):
        assert locate(StoredText("mine.Net")).__name__ == "Net"
        assert locate(StoredText("mine.go"))() == 1
        assert locate(StoredText("Net"), "mine").__name__ == "Net"
        for name in ("os.system", "system", "Popen", "done", "alias", "os"):
            with pytest.raises(TrustError):
                locate(StoredText(f"mine.{name}"))


def test_trusted_packages_of_the_environment_variable(monkeypatch, tmp_path):
    (tmp_path / "theirs.py").write_text("class Net:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("QTORCH_TRUSTED", "a.b, theirs")
    assert locate(StoredText("theirs.Net")).__name__ == "Net"
    with pytest.raises(TrustError):
        locate(StoredText("theirs2.Net"))


def test_files_of_code_must_be_trusted_by_their_path(tmp_path):
    code, other = tmp_path / "own.py", tmp_path / "other.py"
    code.write_text("import os\nclass Own:\n    value = 3\n")
    other.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own:\n    value = 4\n")
    config = as_stored_text({"class": "Own", "module_path": str(code)})
    with pytest.raises(TrustError, match="which is code"):
        init_instance_by_config(config)
    with session_context(trusted=[str(code)]):
        assert init_instance_by_config(config).value == 3
        with pytest.raises(TrustError):
            init_instance_by_config({**config, "module_path": StoredText(other)})
        with pytest.raises(TrustError):  # a dotted name ignores the file
            init_instance_by_config({**config, "class": StoredText("os.system")})
    assert not (tmp_path / "ran").exists()


def test_lightning_callbacks_that_write_files_are_not_trusted():
    names = {n for n, c in vars(pl.callbacks).items() if isinstance(c, type)}
    refused = set()
    for name in names:
        try:
            locate(StoredText(f"pytorch_lightning.callbacks.{name}"))
        except TrustError:
            refused.add(name)
    assert {"ModelCheckpoint", "OnExceptionCheckpoint", "LambdaCallback"} <= refused
    assert "EarlyStopping" not in refused


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def test_no_pickle_is_loaded_unless_the_user_trusts_it(tmp_path, monkeypatch):
    data = pickle.dumps(Malicious(tmp_path / "ran"))
    (tmp_path / "x.pkl").write_bytes(data)
    for source in (data, tmp_path / "x.pkl", pickle.dumps({"a": 1})):
        with pytest.raises(TrustError, match="trusted_pickle"):
            load_pickle(source)
    for config in (tmp_path / "x.pkl", f"file://{tmp_path / 'x.pkl'}"):
        with pytest.raises(TrustError, match="trusted_pickle"):
            init_instance_by_config(config)
    assert not (tmp_path / "ran").exists()
    plain = pickle.dumps({"a": torch.ones(1)})
    assert load_pickle(plain, is_trusted=True)["a"] == 1
    with session_context(trusted_pickle=True):
        assert load_pickle(plain)["a"] == 1
    monkeypatch.setenv("QTORCH_TRUSTED_PICKLE", "1")
    assert load_pickle(plain)["a"] == 1


def test_init_can_trust_pickles(monkeypatch):
    import qtorch.core.session

    monkeypatch.setattr(qtorch.core.session, "_process", qtorch.core.session.Session())
    qtorch.init(trusted_pickle=True)
    assert load_pickle(pickle.dumps(1)) == 1


def test_damaged_pickle_raises_data_error(tmp_path: Path):
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x04not a pickle")
    with pytest.raises(DataError, match=r"x\.pkl cannot be read"):
        load_pickle(path, is_trusted=True)


def test_message_tells_how_to_trust():
    with pytest.raises(TrustError, match=re.escape("qtorch.init(trusted=['mine'])")):
        locate(StoredText("mine.models.Net"))
    with pytest.raises(TrustError, match="not of a type"):
        locate(StoredText("qtorch.cli.main.main"))
