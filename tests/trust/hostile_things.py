"""Hostile configurations, names and pickles: each one leaves a mark if it runs."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Modules that nothing else imports: `antigravity` opens a browser, `this` prints a poem.
EVIL_MODULES = ("evil_module", "evil_package", "antigravity", "this")
LEAVE_MARK = 'import os; open(os.environ["HOSTILE_MARK"], "w").close()'
COMMAND = 'touch "$HOSTILE_MARK"'


def write_evil_module(folder: Path) -> None:
    """Write a module and a package that leave a mark when they are imported."""
    code = f"{LEAVE_MARK}\n\nclass Net:\n    pass\n\ndef go(*args, **kwargs):\n    pass\n"
    (folder / "evil_module.py").write_text(code)
    (folder / "evil_package").mkdir()
    (folder / "evil_package" / "__init__.py").write_text(code)
    (folder / "evil_package" / "part.py").write_text(code)


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __reduce__(self) -> Any:
        return (os.system, (COMMAND,))


class ConfigBomb:
    """A pickle that names only a class of qtorch, whose constructor builds a configuration."""

    def __reduce__(self) -> Any:
        from qtorch.data import DatasetH

        return (DatasetH, ({"_target_": "os.system", "command": COMMAND}, {}))


PICKLES = {
    "system": pickle.dumps(Bomb()),
    "config": pickle.dumps(ConfigBomb()),
    "import": b"cevil_module\nNet\n.",
    "nested": pickle.dumps({"a": [1, {"b": Bomb()}]}),
}

NAMES = (
    "os.system",
    "posix.system",
    "subprocess.getoutput",
    "builtins.exec",
    "builtins.eval",
    "builtins.__import__",
    "importlib.import_module",
    "runpy.run_path",
    "pickle.loads",
    "evil_module.Net",
    "evil_module.go",
    "evil_package.part.Net",
    "antigravity.x",
    "torch.hub.load",
    "torch.load",
    "torch.utils.cpp_extension.load",
    "torch.nn.modules.module.torch.hub.load",
    "mlflow.pyfunc.load_model",
    "pandas.read_pickle",
    "numpy.load",
    "hydra.utils.instantiate",
    "hydra.utils.call",
    "qtorch.core.names.importlib.import_module",
    "qtorch.core.names.import_object",
    "qtorch.core.trust.pickle.loads",
    "qtorch.core.instantiate.init_instance_by_config",
    "qtorch.core.session.os.system",
    "qtorch.process.fork_server.os.system",
    "qtorch.cli.main.main",
    "pytorch_lightning.callbacks.LambdaCallback",
    "pytorch_lightning.callbacks.ModelCheckpoint",
    "pytorch_lightning.loggers.CSVLogger",
    "pytorch_lightning.profilers.PyTorchProfiler",
    "${oc.env:HOME}",
    "${hostile}",
    "os.${name}",
    "file:///etc/passwd",
)


def hostile_configs() -> Iterator[tuple[str, Any]]:
    """Yield a title and a configuration that would run something, in every form."""
    for name in NAMES:
        yield f"_target_ {name}", {"_target_": name, "command": COMMAND}
        yield f"positional {name}", {"_target_": name, "_args_": [COMMAND]}
        yield f"class {name}", {"class": name, "kwargs": {"command": COMMAND}}
        yield f"text {name}", name
    yield "partial", {"_target_": "os.system", "_partial_": True, "_args_": [COMMAND]}
    yield "func", {"func": "os.system", "kwargs": {"command": COMMAND}}
    yield "module_path", {"class": "system", "module_path": "os", "kwargs": {"command": COMMAND}}
    yield "module file", {"class": "Net", "module_path": "evil_module.py"}
    yield "module", {"class": "Net", "module_path": "evil_module"}
    inner = {"_target_": "os.system", "_args_": [COMMAND]}
    yield "in a trusted class", {"_target_": "torch.nn.Sequential", "_args_": [inner]}
    yield "in an argument", {"_target_": "torch.nn.Linear", "in_features": inner, "out_features": 1}
    yield "in kwargs", {"class": "torch.nn.Sequential", "kwargs": {"args": [inner]}}
    yield "in a list", [inner]
    yield "in a list of names", ["evil_module.Net", "os.system"]
    yield "as a key", {"evil_module.go": 1.0, "os.system": 1.0}
    yield (
        "in a callback",
        {
            "_target_": "pytorch_lightning.callbacks.LambdaCallback",
            "on_fit_start": "evil_module.go",
        },
    )
    yield "pickle file", "file://evil.pkl"


def change_everywhere(config: Any, replacement: Any) -> Iterator[tuple[str, Any]]:
    """Yield copies of a configuration with one part replaced, for every part of it."""
    for path in _paths(config):
        changed = copy.deepcopy(config)
        owner = changed
        for key in path[:-1]:
            owner = owner[key]
        owner[path[-1]] = replacement
        yield ".".join(map(str, path)), changed


def _paths(config: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items: Any = ()
    if isinstance(config, Mapping):
        items = config.items()
    elif isinstance(config, list):
        items = enumerate(config)
    for key, value in items:
        yield (*prefix, key)
        yield from _paths(value, (*prefix, key))
