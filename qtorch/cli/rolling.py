"""`qtorch rolling`: retrain a model over rolling windows and stitch the scores into one signal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qtorch.cli.compose import FLEET, LOCAL, compose_settings
from qtorch.cli.guard import configure_process, handle_stop_signals
from qtorch.cli.tables.tasks import model_name
from qtorch.core.errors import ConfigError, format_count

if TYPE_CHECKING:
    from qtorch.study.rolling import RollingResult
    from qtorch.trainer.trainers import Trainer

USAGE = """\
qtorch rolling: rolling retraining, evaluated on the stitched signal

usage: qtorch rolling [GROUP=OPTION ...] [KEY=VALUE ...] [--config-dir DIR]

  step        trading days in the test segment of each window (40)
  rtype       expanding (the train segment keeps its start) or sliding (it keeps its length)
  horizon     horizon of the label in bars; null: the handler's own label
  trunc_days  bars between valid (or train) and test; null: as many as the label needs
  warm_start  true: each window starts from the weights of the previous one
  cache       cache the features of all windows on disk: true, a folder, or false
  runner      local; fleet: all windows at once; rm: through a task pool (pool=NAME url=...
              wait_only=true)
  resume      true: an equal study that did not finish goes on, without the windows that it has
              trained; false: all windows are trained again

  qtorch rolling model=gru step=20 horizon=5
  qtorch rolling data=qlib data.provider_uri=~/qlib_data universe=nyse500 runner=rm pool=gru

The groups (data, handler, dataset, model, trainer, record, ...) are those of `qtorch train`. The
windows move through the test segment of `segments`.
"""

HINT = (
    "Windows that have finished are kept, the others resume from their checkpoints. Continue with "
    "the same command."
)


def main(argv: Sequence[str]) -> int:
    """Compose the task, run the rolling study and print the results."""
    settings = compose_settings("rolling", argv)
    if not isinstance(settings["resume"], bool):
        raise ConfigError(
            f"resume={settings['resume']}: expected true (continue an equal study that did not "
            "finish) or false."
        )
    configure_process(settings["log_level"], (settings["tracking"] or {}).get("uri"))
    start = time.perf_counter()
    with handle_stop_signals():
        try:
            result = _run_study(settings)
        except KeyboardInterrupt as interrupt:
            # That of a window's training says how to continue this window alone.
            raise KeyboardInterrupt(HINT if settings["resume"] else "") from interrupt
        except SystemExit:
            if settings["resume"]:
                print(f"interrupted. {HINT}", file=sys.stderr)
            raise
    _print_result(result, time.perf_counter() - start)
    return 0


def _run_study(settings: dict[str, Any]) -> RollingResult:
    from qtorch.study.rolling import rolling_study

    trainer = _create_trainer(settings)
    return rolling_study(
        settings["task"],
        trainer,
        step=settings["step"],
        rtype=settings["rtype"],
        horizon=settings["horizon"],
        trunc_days=settings["trunc_days"],
        warm_start=settings["warm_start"],
        cache=settings["cache"],
        resume=settings["resume"],
        experiment_name=settings["experiment_name"],
        recorder_name=settings["run_name"] or f"rolling {model_name(settings['task'])}",
    )


def _create_trainer(settings: dict[str, Any]) -> Trainer:
    """Create the trainer of the windows: in this process, or through a task pool."""
    name, window = settings["experiment_name"], f"{model_name(settings['task'])} window"
    if settings["runner"] == LOCAL:
        from qtorch.trainer import TrainerR

        return TrainerR(name, default_rec_name=window)
    if settings["runner"] == FLEET:
        from qtorch.trainer import FleetTrainer

        if settings["warm_start"] is not False:
            raise ConfigError(
                "warm_start=true trains the windows one after another, runner=fleet at once: "
                "remove one of them."
            )
        max_members = settings["fleet"]["max_members"]
        return FleetTrainer(name, default_rec_name=window, max_members=max_members)
    from qtorch.trainer import TrainerRM

    return TrainerRM(
        name,
        settings["pool"],
        skip_run_task=bool(settings["wait_only"]),
        default_rec_name=window,
        url=settings["url"],
    )


def _print_result(result: RollingResult, seconds: float) -> None:
    from qtorch.cli.tables.console import (
        format_number,
        new_table,
        print_table,
        terminal,
        with_label,
    )
    from qtorch.cli.tables.jobs import FIGURES, mlflow_command
    from qtorch.task.rolling import task_segments

    title = f"{format_count(len(result.windows), 'window')}, {seconds:.1f} s"
    table = new_table("window", "train", "test", "run", *FIGURES, title=title, numbers=FIGURES)
    rows = zip(result.tasks, result.windows, result.window_metrics, strict=True)
    for k, (task, recorder, metrics) in enumerate(rows):
        segments = task_segments(task)
        spans = ["..".join(str(d)[:10] for d in segments[s]) for s in ("train", "test")]
        figures = [format_number(metrics.get(f)) for f in FIGURES]
        table.add_row(str(k), *spans, str(recorder.id), *figures)
    metrics = result.recorder.list_metrics()
    table.add_section()
    overall_figures = [format_number(metrics.get(f)) for f in FIGURES]
    table.add_row("all", "", "stitched signal", str(result.recorder.id), *overall_figures)
    print_table(table)
    terminal().print(with_label("view the runs:", mlflow_command()), soft_wrap=True)
