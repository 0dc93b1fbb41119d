"""`qtorch run FILE.yaml`: train what a workflow in Qlib's format describes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from qtorch.cli import train
from qtorch.cli.compose import compose_settings, config_path
from qtorch.cli.guard import configure_process
from qtorch.cli.jobs.sweep_command import MULTIRUN_WORDS, WORKFLOWS
from qtorch.cli.options import output_path
from qtorch.cli.overrides import quote_value
from qtorch.cli.workflow.experiment import write_experiment
from qtorch.cli.workflow.file import Workflow, load_stored_workflow, read_workflow
from qtorch.cli.workflow.task import (
    add_folders,
    init_options,
    report_notes,
    translate_workflow,
)
from qtorch.core.errors import ArgumentError, ConfigError
from qtorch.core.qlib.notes import Notes
from qtorch.tracking.locations import replace_folder

USAGE = """\
qtorch run: train what a workflow file in Qlib's format (of qrun) describes

usage: qtorch run FILE.yaml [KEY=VALUE ...] [-m] [--uri_folder FOLDER]
       qtorch run --translate FILE.yaml out=FOLDER

  KEY=VALUE     overrides reach into the file: task.model.kwargs.n_epochs=1 market=csi500
                +task.model.kwargs.seed=1 adds a key that the file does not have
  -m            a sweep: task.model.kwargs.lr=1e-3,1e-4 seed=0,1,2 (as in qtorch train -m)
  as_qlib=true  Qlib's figures where Qlib is wrong about money
  resume=ID     resume a killed run with its own task
  runner=rm     submit the job to a task pool (pool=NAME url=...)
  --uri_folder  folder of the tracking store; default: that of qtorch (mlruns)
  --translate   write the same job as qtorch's own configuration into FOLDER

Every key of conf/run.yaml can be set too: seed, tracking.uri, run_name, log_level, hydra.*
"""
ROOT = "run"
GROUP, NAME = "qlib_workflow", "current"
# Keys of conf/run.yaml that come from the file.
FILE_KEYS = ("defaults", "experiment_name", "task")
URI_FOLDER, TRANSLATE = "--uri_folder", "--translate"

log = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Run the workflow or translate it; return the exit code of the jobs."""
    words, folder = _take_option(argv, URI_FOLDER)
    files = [w for w in words if "=" not in w and Path(w).suffix.lower() in (".yaml", ".yml")]
    if len(files) != 1:
        problem = f"got {' and '.join(files)}" if files else "got none"
        raise ArgumentError(f"qtorch run takes one workflow file (FILE.yaml), {problem}.")
    words = [w for w in words if w != files[0]]
    configure_process()
    workflow = read_workflow(files[0], list_reserved_keys())
    if TRANSLATE in words:
        return _translate(workflow, [w for w in words if w != TRANSLATE])
    register(workflow.digest, workflow.text, workflow.document)
    if any(word in MULTIRUN_WORDS for word in words):
        _report_notes(workflow, words)
    return train.main([*words, *_own_words(workflow, words, folder)], ROOT)


def resume(words: Sequence[str], workflows: Mapping[str, str], *, is_trusted: bool) -> int:
    """Repeat a stored command of a sweep, with the workflow that is stored with it."""
    prefix = "workflow.digest="
    digest = next((w.removeprefix(prefix) for w in words if w.startswith(prefix)), "")
    if digest not in workflows:
        raise ConfigError(f"the sweep's plan has no workflow {digest!r}: repeat its command.")
    text = workflows[digest]
    document = yaml.safe_load(text) if is_trusted else load_stored_workflow(text, digest)
    if not is_trusted:
        document.pop("sys", None)
    register(digest, text, document)
    return train.main(words, ROOT)


def register(digest: str, text: str, document: Mapping[str, Any]) -> None:
    """Make the workflow a part of the configuration that Hydra composes, also for its workers."""
    WORKFLOWS[digest] = text
    ConfigStore.instance().store(
        group=GROUP, name=NAME, node=dict(document), package="_global_", provider="qtorch run"
    )


def list_reserved_keys() -> dict[str, Any]:
    """Return the keys of conf/run.yaml that a workflow file cannot set."""
    root = yaml.safe_load((config_path() / f"{ROOT}.yaml").read_text(encoding="utf-8"))
    return {k: v for k, v in root.items() if k not in FILE_KEYS}


def _take_option(argv: Sequence[str], name: str) -> tuple[list[str], str | None]:
    """Split an option with a value (`--name VALUE` or `--name=VALUE`) from the words."""
    words, value = list(argv), None
    for k, word in enumerate(words):
        if word == name:
            if k + 1 == len(words):
                raise ArgumentError(f"{name} needs a folder.")
            value = words[k + 1]
            return words[:k] + words[k + 2 :], value
        if word.startswith(f"{name}="):
            return words[:k] + words[k + 1 :], word.partition("=")[2]
    return words, value


def _own_words(workflow: Workflow, words: Sequence[str], folder: str | None) -> list[str]:
    """Return the overrides that the command adds: which workflow it is, and where runs are."""
    added = [
        f"workflow.file={quote_value(str(workflow.path))}",
        f"workflow.digest={workflow.digest}",
    ]
    document: Any = OmegaConf.to_container(OmegaConf.create(workflow.document), resolve=True)
    document["workflow"] = {"file": str(workflow.path)}  # for errors
    uri = folder or init_options(document, Notes()).get("tracking_uri")
    has_store = any(w.lstrip("+").startswith("tracking") for w in words)
    if uri is None or has_store:
        return added
    return [*added, f"tracking.uri={quote_value(replace_folder(uri))}"]


def _report_notes(workflow: Workflow, words: Sequence[str]) -> None:
    """Log what is different here once for all jobs of a sweep; faults are those of the jobs."""
    words = [w for w in words if "," not in w and w not in MULTIRUN_WORDS]
    report_notes(_compose(workflow, [w for w in words if not w.startswith("-")]))


def _compose(workflow: Workflow, words: Sequence[str]) -> dict[str, Any]:
    own_words = _own_words(workflow, words, None)[:2]
    return compose_settings(ROOT, [*words, *own_words])


def _translate(workflow: Workflow, words: Sequence[str]) -> int:
    out = next((w.partition("=")[2] for w in words if w.startswith("out=")), None)
    if not out:
        raise ArgumentError(f"qtorch run {TRANSLATE} needs out=FOLDER.")
    register(workflow.digest, workflow.text, workflow.document)
    settings = _compose(workflow, [w for w in words if not w.startswith("out=")])
    add_folders(settings.get("sys"))
    notes = Notes()
    task = translate_workflow(settings, settings["task"], notes)
    path = write_experiment(output_path(out), workflow.path.stem, task, settings, notes)
    print(f"wrote {path}. Run it with: qtorch train --config-dir {out} experiment={path.stem}")
    return 0
