"""What a run was made with: code, packages, device, data. The artifact `environment`.

With it a run can be repeated (`qtorch replay`), and told what differs where the numbers do.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import qtorch
from qtorch.tracking.provenance import git_output
from qtorch.tracking.recorder import Recorder

log = logging.getLogger(__name__)

ENVIRONMENT = "environment"
FORMAT = 1
PACKAGES = ("torch", "pytorch-lightning", "numpy", "pandas", "mlflow", "lightgbm")


def save_environment(recorder: Recorder, model: Any, dataset: Any) -> None:
    """Write the artifact; what cannot be told is left out, and nothing here fails a training."""
    try:
        recorder.save_objects(environment=environment_of(model, dataset))
    except Exception as error:
        log.warning("the run's environment is not recorded: %s", error)


def environment_of(model: Any, dataset: Any) -> dict[str, Any]:
    """Plain data: `format`, `python`, `packages`, `code`, `device`, `threads`, `data`, ...

    `data` is the fingerprint of the dataset's bars, None for a dataset that has none.
    """
    return {
        "format": FORMAT,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": _packages(),
        "code": _code(),
        **_device(model),
        "data": _fingerprint(dataset),
    }


@cache
def _packages() -> dict[str, str]:
    found = {"qtorch": qtorch.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def _code() -> dict[str, Any]:
    """The commit of qtorch's own code where it runs from a working tree; asked for once: the
    process's code is that of its start. Uncommitted changes are told by a hash of them."""
    folder = Path(qtorch.__file__).parent
    commit = None
    if (folder.parent / ".git").exists():
        commit = git_output(["git", "-C", str(folder), "rev-parse", "HEAD"])
    if commit is None:
        return {"commit": None}
    changes = git_output(["git", "-C", str(folder), "diff", "HEAD", "--", "."])
    changed = hashlib.sha256(changes.encode()).hexdigest()[:12] if changes else None
    return {"commit": commit.strip(), "uncommitted": changed}


def _device(model: Any) -> dict[str, Any]:
    """Where it was trained, and what of torch's settings may change the last bits."""
    report = getattr(model, "fit_report_", None) or {}
    device = str(report.get("device") or "cpu")
    torch = sys.modules.get("torch")
    found: dict[str, Any] = {"device": device, "device_name": _processor()}
    if torch is None:
        return found
    if device.startswith("cuda"):
        found["device_name"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    found["threads"] = torch.get_num_threads()
    found["matmul_precision"] = torch.get_float32_matmul_precision()
    found["deterministic"] = torch.are_deterministic_algorithms_enabled()
    return found


@cache
def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _fingerprint(dataset: Any) -> str | None:
    ask = getattr(dataset, "fingerprint", None)
    if not callable(ask):
        return None
    try:
        return str(ask())
    except Exception as error:
        log.debug("the data have no fingerprint: %s", error)
        return None
