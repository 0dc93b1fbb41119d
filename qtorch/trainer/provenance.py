"""Record the environment of a run (code, packages, device, data) as the artifact `environment`.

It is used to repeat a run (`qtorch replay`) and to explain differences in the results.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import qtorch
from qtorch.core.configured import Configured
from qtorch.core.errors import ConfigError, DataError
from qtorch.core.identity import digest
from qtorch.core.source_files import package_digest, source_digests
from qtorch.tracking.provenance import git_output
from qtorch.tracking.recorder import Recorder

log = logging.getLogger(__name__)

DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
ENVIRONMENT = "environment"
DATA_TAG, SOURCES_TAG = "qtorch.data_fingerprint", "qtorch.user_code"
LIBRARY_TAG = "qtorch.version"
UNKNOWN = "unknown"
FORMAT = 2
PACKAGES = (  # packages that can influence results; those not installed are skipped
    *("torch", "pytorch-lightning", "lightning", "hydra-core", "omegaconf"),
    *("numpy", "pandas", "pyarrow", "scipy", "mlflow", "safetensors"),
    *("lightgbm", "xgboost", "xgboost-cpu", "catboost", "cvxpy", "optuna"),
)


@dataclass(frozen=True)
class RunInputs:
    """What the numbers of a run depend on besides its task; None where it is unknown.

    `data` is the fingerprint of the dataset's bars, taken before they are loaded; `sources` are the
    digests of the files of the user's modules; `library` is qtorch's version and a digest of its
    code.
    """

    data: str | None
    sources: Mapping[str, str | None] | None
    library: str

    @property
    def tags(self) -> dict[str, str]:
        """The tags of a run with these inputs."""
        known_sources = self.sources is not None and None not in self.sources.values()
        sources = digest(self.sources) if known_sources else UNKNOWN
        return {DATA_TAG: self.data or UNKNOWN, SOURCES_TAG: sources, LIBRARY_TAG: self.library}

    @property
    def identity(self) -> str | None:
        """A hash of the inputs; None if a part is unknown, so that nothing can be equal to them."""
        return None if UNKNOWN in self.tags.values() else digest(self.tags)

    def find_changes(self, tags: Mapping[str, str]) -> list[str]:
        """Describe which inputs a run with these tags is known to have had otherwise."""
        return [
            f"{self._name(tag)} changed ({tags[tag][:12]} then, {value[:12]} now)"
            for tag, value in self.tags.items()
            if UNKNOWN not in (value, tags.get(tag, UNKNOWN)) and tags[tag] != value
        ]

    def find_differences(self, tags: Mapping[str, str]) -> list[str]:
        """Describe which inputs differ, or cannot be compared; empty only if all are equal."""
        if DATA_TAG not in tags:
            return ["it has no record of its data and code"]
        reasons = {DATA_TAG: "a dataset without fingerprint()", SOURCES_TAG: "no source file"}
        unknown = [
            f"{self._name(tag)} cannot be compared ({reasons.get(tag, 'no record')})"
            for tag, value in self.tags.items()
            if UNKNOWN in (value, tags.get(tag, UNKNOWN))
        ]
        return [*unknown, *self.find_changes(tags)]

    def _name(self, tag: str) -> str:
        modules = ", ".join(self.sources or ()) or "none"
        return {
            DATA_TAG: "the data",
            SOURCES_TAG: f"the code of the task's own modules ({modules})",
            LIBRARY_TAG: "qtorch's version or code",
        }[tag]

    def describe(self) -> str:
        """Name what a reused run has in common with a task, for log lines."""
        own_code = f"same code in {', '.join(self.sources)}" if self.sources else "no code of yours"
        return (
            f"same task, same data {str(self.data)[:12]}, {own_code}, same qtorch "
            f"{self.library[:12]}"
        )


def collect_inputs(task: Mapping[str, Any], dataset: Any) -> RunInputs:
    """Collect the inputs of a task before its data is loaded; never raises."""
    library = f"{qtorch.__version__} {package_digest()}"
    return RunInputs(_fingerprint(dataset), collect_source_digests(task), library)


def refuse_changed_data(dataset: Any, inputs: RunInputs) -> None:
    """Raise DataError if the dataset's data is no longer what it was before it was loaded."""
    if inputs.data is None:
        return
    try:
        current = str(dataset.fingerprint())
    except OSError as error:
        current = f"none: {error}"
    if current != inputs.data:
        raise DataError(
            f"the data of {_data_location(dataset)} changed during the run (fingerprint "
            f"{inputs.data} before it was loaded, {current} now), so that nobody can tell which "
            "data the result is from. Run it again when nothing writes to the data."
        )


def _data_location(dataset: Any) -> str:
    """Return the paths in a dataset's configuration, else its class."""
    try:
        strings = find_strings(dataset.to_config())
    except (AttributeError, ConfigError):
        strings = iter(())
    paths = dict.fromkeys(text for text in strings if os.sep in text and os.path.exists(text))
    return ", ".join(paths) or type(dataset).__name__


def save_environment(recorder: Recorder, model: Any, inputs: RunInputs) -> None:
    """Save the artifact `environment`; never raises, so that it cannot fail a training."""
    try:
        recorder.save_objects(environment=describe_environment(model, inputs))
    except Exception as error:
        log.warning("could not record the run's environment: %s", error)


def describe_environment(model: Any, inputs: RunInputs) -> dict[str, Any]:
    """Describe the environment as plain data: `format`, `python`, `packages`, `code`, `device`, ...

    `sources` and `data` are those of `inputs`. Unknown values are None (e.g. for a dataset without
    a fingerprint).
    """
    return {
        "format": FORMAT,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": _package_versions(),
        "code": _code_version(),
        "sources": None if inputs.sources is None else dict(inputs.sources),
        **_device_info(model),
        "data": inputs.data,
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
    git = ["git", "-C", str(folder)]
    # An installed package may lie inside the working tree of another project.
    is_own_tree = (folder.parent / ".git").exists()
    commit = git_output([*git, "rev-parse", "HEAD"]) if is_own_tree else None
    if commit is None:
        return {"commit": None}
    changes = git_output([*git, "diff", "HEAD", "--", "."]) or ""
    untracked_args = ["ls-files", "-z", "--others", "--exclude-standard", "--", "*.py"]
    for name in filter(None, (git_output([*git, *untracked_args]) or "").split("\0")):
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
    defaults = {
        "matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    info |= {name: report.get(name, value) for name, value in defaults.items()}
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


def collect_source_digests(task: Mapping[str, Any]) -> dict[str, str | None] | None:
    """Collect the digests of the source files of the user's modules that a task uses.

    These are the modules that the task names, those of registered operators that it names, and all
    that these import. Called before the training, because files may be edited while it runs.
    Returns None if the digests cannot be computed; never raises.
    """
    try:
        return source_digests([*_find_names(task), *_operator_modules(task)])
    except Exception as error:
        log.warning("could not record the sources of the user's modules: %s", error)
        return None


def _operator_modules(task: Mapping[str, Any]) -> Iterator[str]:
    """Yield the modules of the user's operators in the expressions of a task."""
    operators = sys.modules.get("qtorch.data.expression.operators")
    if operators is None:
        return
    functions = {n: o.function for n, o in operators.get_operators().items() if o.function}
    text = "\n".join(find_strings(task)) if functions else ""
    for name, function in functions.items():
        if re.search(rf"\b{name}\s*\(", text):
            yield function.__module__


def find_strings(part: Any) -> Iterator[str]:
    """Yield all strings of a nested configuration, keys left out."""
    if isinstance(part, Mapping):
        for value in part.values():
            yield from find_strings(value)
    elif isinstance(part, list | tuple):
        for value in part:
            yield from find_strings(value)
    elif isinstance(part, str):
        yield part


def _find_names(part: Any) -> Iterator[str]:
    """Yield all strings of a task that may name a module or an object in a module."""
    if isinstance(part, Configured):
        yield type(part).__module__
        try:
            part = part.to_config()
        except ConfigError:
            return
    if isinstance(part, Mapping):
        module = part.get("module_path")
        if isinstance(module, str):
            yield module
        yield from (k for k in part if isinstance(k, str) and DOTTED.fullmatch(k))  # of losses
        for value in part.values():
            yield from _find_names(value)
    elif isinstance(part, list | tuple):
        for value in part:
            yield from _find_names(value)
    elif isinstance(part, str):
        if DOTTED.fullmatch(part):
            yield part
    else:
        yield getattr(part, "__module__", None) or type(part).__module__
