"""`qtorch finetune`: a finished run's model learns on, in a run of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from qtorch.cli.compose import composed
from qtorch.cli.finished import finished_run
from qtorch.cli.segments import with_dates
from qtorch.cli.signals import interruptible
from qtorch.cli.sweep import FINISHED, JobResult
from qtorch.core.errors import ConfigError
from qtorch.core.instantiate import plain
from qtorch.core.runtime import configure_logging
from qtorch.core.session import init

USAGE = """\
qtorch finetune: a finished run's model learns on other data, in a run of its own

usage: qtorch finetune run=RUN_ID [dataset.KEY=VALUE ...] [OPTION=VALUE ...]

  run             the run whose model it is; it is not touched
  dataset.KEY     over that run's dataset: dataset.segments.train=[2016-01-01,2016-12-31]
                  dataset.handler.instruments=smallcaps
  max_epochs, lr, early_stop, trainer   instead of the model's own
  train           all, head, or patterns of parameter names; frozen: patterns that stay
  layer_decay     each layer's rate as a share of the one's above it
  unfreeze_every  epochs until one layer more learns, from the head down
  lora            lora={rank: 4}: matrices of low rank learn, and are merged in at the end
  keep_optimizer  true: the optimizer goes on with its moments
  statistics      keep, refit or adapt: what features and batch norms are normalised by

The run is tagged warm_start.from and lies under the earlier one on MLflow's page.
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
    """Load the run's task, train its model on, print the summary."""
    if any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0
    own = [a for a in argv if a.lstrip("+").startswith("dataset.")]
    settings = composed("finetune", [a for a in argv if a not in own])
    configure_logging(settings["log_level"])
    if settings["tracking"].get("uri") is not None:
        init(tracking_uri=settings["tracking"]["uri"])
    begin = time.perf_counter()
    with interruptible():
        recorder = _train(settings, [a.lstrip("+") for a in own])
    from qtorch.cli.table import print_summary

    result = JobResult(0, list(argv), FINISHED, time.perf_counter() - begin)
    result.run_id, result.metrics = recorder.id, recorder.list_metrics()
    result.experiment = getattr(recorder, "experiment_name", None)
    print_summary(result, recorder)
    return 0


def _train(settings: dict[str, Any], changes: Sequence[str]) -> Any:
    from qtorch.trainer.run import task_train

    earlier = finished_run(settings["run"])
    task = earlier.load_object("task")
    unsaid = (None, [], {})  # what the model's own argument says is left to it
    options = {k: settings[k] for k in OPTIONS if settings[k] not in (*unsaid, DEFAULTS.get(k))}
    model = {
        "_target_": "qtorch.study.WarmStart",
        "recorder_id": earlier.id,
        "experiment_id": earlier.experiment_id,
        "options": options,
    }
    learnt = {**task, "model": model, "dataset": changed(task["dataset"], changes)}
    name = settings["experiment_name"] or getattr(earlier, "experiment_name", None)
    return task_train(with_dates(learnt), name, settings["run_name"])


def changed(dataset: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """A dataset's configuration with `dataset.KEY=VALUE` over it.

    Raises ConfigError for a change that is none, or reaches into what is no mapping.
    """
    try:
        merged = OmegaConf.merge({"dataset": dataset}, OmegaConf.from_dotlist(list(changes)))
        found: dict[str, Any] = plain(merged)["dataset"]
    except Exception as error:
        raise ConfigError(f"{' '.join(changes)}: {str(error).splitlines()[0]}") from error
    return found
