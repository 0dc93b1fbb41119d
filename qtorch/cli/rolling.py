"""`qtorch rolling`: retrain a model over rolling windows and stitch the scores into one signal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qtorch.cli.compose import compose_settings
from qtorch.cli.guard import handle_stop_signals
from qtorch.core.errors import ConfigError, format_count, unknown_name
from qtorch.core.runtime import configure_logging
from qtorch.core.session import init

if TYPE_CHECKING:
    from qtorch.study.rolling import RollingResult
    from qtorch.trainer.trainers import Trainer

USAGE = """\
qtorch rolling: rolling retraining, evaluated on the stitched signal

usage: qtorch rolling [GROUP=OPTION ...] [KEY=VALUE ...] [--config-dir DIR]

  step        trading days in the test segment of each window (40)
  rtype       expanding (the train segment keeps its start) or sliding (it keeps its length)
  horizon     horizon of the label in days; null: the handler's own label
  trunc_days  days between valid (or train) and test; null: as many as the label needs
  warm_start  true: each window starts from the weights of the previous one
  cache       cache the features of all windows on disk: true, a folder, or false
  runner      local, or rm: through a task pool (pool=NAME url=... wait_only=true)

  qtorch rolling model=gru step=20 horizon=5
  qtorch rolling data=qlib data.provider_uri=~/qlib_data universe=nyse500 runner=rm pool=gru

The groups (data, handler, dataset, model, trainer, record, ...) are those of `qtorch train`. The
windows move through the test segment of `segments`.
"""
LOCAL, POOL = "local", "rm"
FIGURES = ("IC", "ICIR", "Rank IC", "Rank ICIR")


def main(argv: Sequence[str]) -> int:
    """Compose the task, run the rolling study and print the results."""
    if any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0
    settings = compose_settings("rolling", argv)
    configure_logging(settings["log_level"])
    uri = (settings["tracking"] or {}).get("uri")
    if uri is not None:
        init(tracking_uri=uri)
    start = time.perf_counter()
    with handle_stop_signals():
        result = _run_study(settings)
    _print_result(result, time.perf_counter() - start)
    return 0


def _run_study(settings: dict[str, Any]) -> RollingResult:
    from qtorch.cli.compose import resolve_segments
    from qtorch.study.rolling import rolling_study

    trainer = _create_trainer(settings)
    return rolling_study(
        resolve_segments(settings["task"]),
        trainer,
        step=settings["step"],
        rtype=settings["rtype"],
        horizon=settings["horizon"],
        trunc_days=settings["trunc_days"],
        warm_start=settings["warm_start"],
        cache=settings["cache"],
        experiment_name=settings["experiment_name"],
        recorder_name=settings["run_name"] or f"rolling {_network_name(settings)}",
    )


def _create_trainer(settings: dict[str, Any]) -> Trainer:
    """Create the trainer of the windows: in this process, or through a task pool."""
    name, window = settings["experiment_name"], f"{_network_name(settings)} window"
    if settings["runner"] == LOCAL:
        from qtorch.trainer import TrainerR

        return TrainerR(name, default_rec_name=window)
    if settings["runner"] == POOL:
        from qtorch.trainer import TrainerRM

        return TrainerRM(
            name,
            settings["pool"],
            skip_run_task=bool(settings["wait_only"]),
            default_rec_name=window,
            url=settings["url"],
        )
    raise ConfigError(unknown_name("runner", str(settings["runner"]), (LOCAL, POOL)))


def _network_name(settings: dict[str, Any]) -> str:
    """Return the name of the network, which is used to name the runs."""
    model = settings["task"]["model"]
    network = model.get("network", model) if isinstance(model, dict) else model
    name = network.get("_target_", "model") if isinstance(network, dict) else network
    return str(name).rpartition(".")[2]


def _print_result(result: RollingResult, seconds: float) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from qtorch.cli.tables import format_number, mlflow_command
    from qtorch.task.rolling import task_segments

    console = Console() if sys.stdout.isatty() else Console(width=160)
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=f"{format_count(len(result.windows), 'window')}, {seconds:.1f} s",
        title_justify="left",
    )
    for name in ("window", "train", "test", "run"):
        table.add_column(name, overflow="fold")
    for name in FIGURES:
        table.add_column(name, justify="right")
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
    console.print(table)
    console.print(f"[dim]view the runs:[/dim] {mlflow_command()}", soft_wrap=True)
