"""Record the environment of a run (code, packages, device, data) as the artifact `environment`.

It is used to repeat a run (`qtorch replay`) and to explain differences in the results.
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
PACKAGES = (  # packages that can influence results; those not installed are skipped
    *("torch", "pytorch-lightning", "lightning", "hydra-core", "omegaconf"),
    *("numpy", "pandas", "pyarrow", "scipy", "mlflow", "safetensors"),
    *("lightgbm", "cvxpy", "optuna"),
)


def collect_source_digests(task: Mapping[str, Any]) -> dict[str, str | None] | None:
    """Collect the source digests for `describe_environment`.

    Called before the training, because files may be edited while it runs. Returns None if the
    digests cannot be computed; never raises.
    """
    try:
        return source_digests(task)
    except Exception as error:
        log.warning("could not record the sources of the user's modules: %s", error)
        return None


def save_environment(
    recorder: Recorder, model: Any, dataset: Any, sources: Mapping[str, str | None] | None
) -> None:
    """Save the artifact `environment`; never raises, so that it cannot fail a training."""
    try:
        recorder.save_objects(environment=describe_environment(model, dataset, sources))
    except Exception as error:
        log.warning("could not record the run's environment: %s", error)


def describe_environment(
    model: Any, dataset: Any, sources: Mapping[str, str | None] | None
) -> dict[str, Any]:
    """Describe the environment as plain data: `format`, `python`, `packages`, `code`, `device`, ...

    `sources` are digests of the files of the user's modules, `data` is the fingerprint of the
    dataset's bars. Unknown values are None (e.g. for a dataset without a fingerprint).
    """
    return {
        "format": FORMAT,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": _package_versions(),
        "code": _code_version(),
        "sources": None if sources is None else dict(sources),
        **_device_info(model),
        "data": _fingerprint(dataset),
    }


@cache
def _package_versions() -> dict[str, str]:
    versions = {"qtorch": qtorch.__version__}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


@cache
def _code_version() -> dict[str, Any]:
    """The commit of qtorch if it runs from a git working tree, and a hash of uncommitted changes.

    The hash includes untracked files. Cached, because the process runs the code of its start.
    """
    folder = Path(qtorch.__file__).parent
    commit = None
    if (folder.parent / ".git").exists():
        commit = git_output(["git", "-C", str(folder), "rev-parse", "HEAD"])
    if commit is None:
        return {"commit": None}
    changes = git_output(["git", "-C", str(folder), "diff", "HEAD", "--", "."]) or ""
    untracked_args = ["ls-files", "-z", "--others", "--exclude-standard", "--", "*.py"]
    for name in filter(
        None, (git_output(["git", "-C", str(folder), *untracked_args]) or "").split("\0")
    ):
        changes += name + hashlib.sha256((folder / name).read_bytes()).hexdigest()
    changes_digest = hashlib.sha256(changes.encode()).hexdigest()[:12] if changes else None
    return {"commit": commit.strip(), "uncommitted": changes_digest}


def _device_info(model: Any) -> dict[str, Any]:
    """The training device, and the torch settings that can change the last bits of results."""
    report = getattr(model, "fit_report_", None) or {}
    device = str(report.get("device") or "cpu")
    torch = sys.modules.get("torch")
    info: dict[str, Any] = {"device": device, "device_name": _processor_name()}
    if torch is None:
        return info
    if device.startswith("cuda"):
        info["device_name"] = torch.cuda.get_device_name(device)
        info["cuda"] = torch.version.cuda
    info["threads"] = torch.get_num_threads()
    info["matmul_precision"] = torch.get_float32_matmul_precision()
    info["deterministic"] = torch.are_deterministic_algorithms_enabled()
    return info


@cache
def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _fingerprint(dataset: Any) -> str | None:
    fingerprint = getattr(dataset, "fingerprint", None)
    if not callable(fingerprint):
        return None
    try:
        return str(fingerprint())
    except Exception as error:
        log.debug("the dataset has no fingerprint: %s", error)
        return None
