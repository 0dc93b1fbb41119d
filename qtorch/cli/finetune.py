"""`qtorch finetune`: fine-tune the model of a finished run in a new run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from qtorch.cli.compose import compose_settings
from qtorch.cli.guard import configure_process, handle_stop_signals
from qtorch.cli.runs import load_finished_run
from qtorch.core.errors import ConfigError
from qtorch.core.instantiate import resolve_config
from qtorch.trainer.segments import resolve_segments

USAGE = """\
qtorch finetune: fine-tune the model of a finished run in a new run

usage: qtorch finetune run=RUN_ID [dataset.KEY=VALUE ...] [OPTION=VALUE ...]

  run             the run whose model is fine-tuned (ID, first digits, name, or latest); it is
                  not modified
  dataset.KEY     override of that run's dataset: dataset.segments.train=[2016-01-01,2016-12-31]
                  dataset.handler.instruments=smallcaps
  max_epochs, lr, early_stop, trainer   override the model's settings
  train           all, head, or patterns of parameter names; frozen: patterns to freeze
  layer_decay     learning rate of each layer, relative to the layer above it
  unfreeze_every  unfreeze one more layer after so many epochs, from the head down
  lora            lora={rank: 4}: train low-rank matrices, and merge them at the end
  keep_optimizer  true: start from the optimizer's state
  statistics      keep, refit or adapt the statistics of processors and batch norms

The new run has the tag warm_start.from and is a child of the earlier run in MLflow.
"""
OPTIONS = (
    "max_epochs",
    "lr",
    "early_stop",
    "train",
    "frozen",
    "layer_decay",
    "unfreeze_every",
    "lora",
    "keep_optimizer",
    "statistics",
    "trainer",
)

DEFAULTS = {"train": "all", "layer_decay": 1.0, "keep_optimizer": False}


def main(argv: Sequence[str]) -> int:
    """Load the run's task, fine-tune its model and print the summary."""
    dataset_overrides = [a for a in argv if a.lstrip("+").startswith("dataset.")]
    settings = compose_settings("finetune", [a for a in argv if a not in dataset_overrides])
    configure_process(settings["log_level"], settings["tracking"].get("uri"))
    start = time.perf_counter()
    with handle_stop_signals():
        recorder = _train(settings, [a.lstrip("+") for a in dataset_overrides])
    from qtorch.cli.tables.jobs import print_summary
    from qtorch.study.sweep import JobResult

    result = JobResult(
        number=0,
        overrides=list(argv),
        status=recorder.status,
        seconds=time.perf_counter() - start,
        run_id=recorder.id,
        experiment=getattr(recorder, "experiment_name", None),
        metrics=recorder.list_metrics(),
    )
    print_summary(result, recorder)
    return 0


def _train(settings: dict[str, Any], changes: Sequence[str]) -> Any:
    from qtorch.trainer.run import task_train

    earlier = load_finished_run(settings["run"])
    task = earlier.load_object("task")
    # Options that are not given keep the model's own arguments.
    options = {
        k: settings[k] for k in OPTIONS if settings[k] not in (None, [], {}, DEFAULTS.get(k))
    }
    model = {
        "_target_": "qtorch.study.WarmStart",
        "recorder_id": earlier.id,
        "experiment_id": earlier.experiment_id,
        "options": options,
    }
    new_task = {**task, "model": model, "dataset": override_dataset(task["dataset"], changes)}
    name = settings["experiment_name"] or getattr(earlier, "experiment_name", None)
    return task_train(resolve_segments(new_task), name, settings["run_name"])


def override_dataset(dataset: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """Apply `dataset.KEY=VALUE` overrides to a dataset's configuration.

    Raises ConfigError for an invalid override, or one that descends into a value that is no
    mapping.
    """
    try:
        overrides = resolve_config(OmegaConf.from_dotlist(list(changes)))
    except Exception as error:
        raise ConfigError(f"{' '.join(changes)}: {str(error).splitlines()[0]}") from error
    return _merge(dataset, overrides.get("dataset", {}), "dataset")


def _merge(config: Any, changes: Mapping[str, Any], location: str) -> dict[str, Any]:
    """Return a stored configuration with changes; its text stays `StoredText`, unlike theirs."""
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"{location} is {config!r:.60}, which has no keys: {location}.{next(iter(changes))} "
            "cannot be set."
        )
    merged = dict(config)
    for key, value in changes.items():
        is_nested = isinstance(value, Mapping) and merged.get(key) is not None
        merged[key] = _merge(merged[key], value, f"{location}.{key}") if is_nested else value
    return merged
