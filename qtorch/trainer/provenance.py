"""What a run was made with: code, packages, device, data. The artifact `environment`.

With it a run can be repeated (`qtorch replay`), and told what differs where the numbers do.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import qtorch
from qtorch.tracking.provenance import git_output
from qtorch.tracking.recorder import Recorder
from qtorch.trainer.sources import source_digests

log = logging.getLogger(__name__)

ENVIRONMENT = "environment"
FORMAT = 2
PACKAGES = (  # that take part in numbers, where they are installed
    *("torch", "pytorch-lightning", "lightning", "hydra-core", "omegaconf"),
    *("numpy", "pandas", "pyarrow", "scipy", "mlflow", "safetensors"),
    *("lightgbm", "cvxpy", "optuna"),
)


def sources_of(task: Mapping[str, Any]) -> dict[str, str | None] | None:
    """What `environment_of` is given, asked for before the training: a file may be edited during
    it. None where it cannot be told; nothing here fails a training."""
    try:
        return source_digests(task)
    except Exception as error:
        log.warning("the sources of the task's own modules are not recorded: %s", error)
        return None


def save_environment(
    recorder: Recorder, model: Any, dataset: Any, sources: Mapping[str, str | None] | None
) -> None:
    """Write the artifact; what cannot be told is left out, and nothing here fails a training."""
    try:
        recorder.save_objects(environment=environment_of(model, dataset, sources))
    except Exception as error:
        log.warning("the run's environment is not recorded: %s", error)


def environment_of(
    model: Any, dataset: Any, sources: Mapping[str, str | None] | None
) -> dict[str, Any]:
    """Plain data: `format`, `python`, `packages`, `code`, `sources`, `device`, `threads`, ...

    `sources` are digests of the files of the user's own modules, `data` is the fingerprint of the
    dataset's bars; None is what is not known (a dataset without a fingerprint).
    """
    return {
        "format": FORMAT,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": _packages(),
        "code": _code(),
        "sources": None if sources is None else dict(sources),
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
    process's code is that of its start. Uncommitted changes and files that git does not know are
    told by a hash of them."""
    folder = Path(qtorch.__file__).parent
    commit = None
    if (folder.parent / ".git").exists():
        commit = git_output(["git", "-C", str(folder), "rev-parse", "HEAD"])
    if commit is None:
        return {"commit": None}
    changes = git_output(["git", "-C", str(folder), "diff", "HEAD", "--", "."]) or ""
    new = ["ls-files", "-z", "--others", "--exclude-standard", "--", "*.py"]
    for name in filter(None, (git_output(["git", "-C", str(folder), *new]) or "").split("\0")):
        changes += name + hashlib.sha256((folder / name).read_bytes()).hexdigest()
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
