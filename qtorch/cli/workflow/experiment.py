"""Write a translated workflow as qtorch's own configuration: an experiment on top of conf/."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qtorch.core.errors import ConfigError
from qtorch.core.files import atomic_write
from qtorch.core.qlib.notes import Notes

# The groups of conf/train.yaml that the experiment replaces.
LEFT_OUT = ("handler", "dataset", "model", "callbacks")
DEFAULT_CLIPPING = {"gradient_clip_val": None, "gradient_clip_algorithm": None}
WIDTH = 96


def write_experiment(
    folder: Path, name: str, task: Mapping[str, Any], settings: Mapping[str, Any], notes: Notes
) -> Path:
    """Write `FOLDER/experiment/NAME.yaml` and return its path.

    `task` is a translated task. What differs from the workflow stands in comments at the top.
    Raises ConfigError if the file exists.
    """
    path = folder / "experiment" / f"{re.sub(r'[^A-Za-z0-9_]+', '_', name)}.yaml"
    if path.exists():
        raise ConfigError(f"{path} exists; choose another folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    body = yaml.safe_dump(
        experiment_config(task, settings), sort_keys=False, width=WIDTH, allow_unicode=True
    )
    header = _header(folder, path.stem, settings, notes)
    with atomic_write(path) as temporary:
        temporary.write_text(f"{header}\n{body}", encoding="utf-8")
    return path


def experiment_config(task: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the experiment: groups that it replaces, then data, dataset, model and records."""
    dataset, model = dict(task["dataset"]), dict(task["model"])
    handler = dict(dataset.get("handler") or {})
    source = handler.pop("source", None) or {}
    config: dict[str, Any] = {
        "defaults": [
            {"override /data": "qlib"},
            *({f"override /{group}": None} for group in LEFT_OUT),
            {"override /record": "none"},
        ],
        "seed": task["seed"],
        "experiment_name": settings["experiment_name"],
        "data": {"provider_uri": source.get("provider_uri")},
        "segments": dataset.pop("segments", {}),
    }
    region = [r["region"] for r in task["record"] if isinstance(r, Mapping) and "region" in r]
    if region:
        config["region"] = region[0]
    if "trainer" in model:
        config["trainer"] = {**DEFAULT_CLIPPING, **model["trainer"]}
        model["trainer"] = "${trainer}"
    config["handler"] = {**handler, "source": "${data}"}
    config["dataset"] = {**dataset, "handler": "${handler}", "segments": "${segments}"}
    config["model"] = model
    config["record"] = task["record"]
    return config


def _header(folder: Path, name: str, settings: Mapping[str, Any], notes: Notes) -> str:
    file = Path(str(settings["workflow"]["file"])).name
    lines = [
        "# @package _global_",
        f"# The workflow {file} as an experiment of qtorch. Run it with",
        f"#   qtorch train --config-dir {folder.name} experiment={name}",
    ]
    for title, texts in (
        ("Changed", notes.changes),
        ("To do", notes.warnings),
        ("Without a meaning here", [f"{k}: {v}" for k, v in notes.ignored.items()]),
    ):
        if texts:
            lines.append(f"# {title}:")
            lines += [f"# - {text}" for text in texts]
    return "\n".join(lines)
