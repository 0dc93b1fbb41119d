"""`qtorch rolling`: a model trained again and again through time, its scores as one signal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qtorch.cli.compose import composed
from qtorch.cli.signals import interruptible
from qtorch.core.errors import ConfigError, unknown_name
from qtorch.core.runtime import configure_logging
from qtorch.core.session import init
from qtorch.core.wording import counted

if TYPE_CHECKING:
    from qtorch.study.rolling import RollingResult
    from qtorch.trainer.base import Trainer

USAGE = """\
qtorch rolling: train through time, judge the stitched signal

usage: qtorch rolling [GROUP=OPTION ...] [KEY=VALUE ...] [--config-dir DIR]

  step        trading days that each window is tested on (40)
  rtype       expanding (the train segment keeps its start) or sliding (its length)
  horizon     days of the label's return; null: the handler's own label
  trunc_days  train and valid end so many days before the test; null: as far as the label looks
  warm_start  true: each window begins from the weights of the one before
  cache       keep the features on disk for all windows: true, a folder, or false
  runner      local, or rm: through a task pool (pool=NAME url=... wait_only=true)

  qtorch rolling model=gru step=20 horizon=5
  qtorch rolling data=qlib data.provider_uri=~/qlib_data universe=nyse500 runner=rm pool=gru

The groups (data, handler, dataset, model, trainer, record, ...) are those of `qtorch train`. The
test segment of `segments` is the span that is rolled through.
"""
LOCAL, POOL = "local", "rm"
FIGURES = ("IC", "ICIR", "Rank IC", "Rank ICIR")


def main(argv: Sequence[str]) -> int:
    """Compose the task, run the study, say what came out."""
    if any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0
    settings = composed("rolling", argv)
    configure_logging(settings["log_level"])
    uri = (settings["tracking"] or {}).get("uri")
    if uri is not None:
        init(tracking_uri=uri)
    begin = time.perf_counter()
    with interruptible():
        result = _study(settings)
    _print(result, time.perf_counter() - begin)
    return 0


def _study(settings: dict[str, Any]) -> RollingResult:
    from qtorch.cli.segments import with_dates
    from qtorch.study.rolling import rolling_study

    trainer = _trainer(settings)
    return rolling_study(
        with_dates(settings["task"]),
        trainer,
        step=settings["step"],
        rtype=settings["rtype"],
        horizon=settings["horizon"],
        trunc_days=settings["trunc_days"],
        warm_start=settings["warm_start"],
        cache=settings["cache"],
        experiment_name=settings["experiment_name"],
        recorder_name=settings["run_name"] or f"rolling {_network(settings)}",
    )


def _trainer(settings: dict[str, Any]) -> Trainer:
    """What the windows are trained by: this process, or a pool."""
    name, window = settings["experiment_name"], f"{_network(settings)} window"
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


def _network(settings: dict[str, Any]) -> str:
    """The network's name, for runs to be told apart."""
    model = settings["task"]["model"]
    network = model.get("network", model) if isinstance(model, dict) else model
    name = network.get("_target_", "model") if isinstance(network, dict) else network
    return str(name).rpartition(".")[2]


def _print(result: RollingResult, seconds: float) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from qtorch.cli.table import number, page_command
    from qtorch.task.parts import segments_of

    console = Console() if sys.stdout.isatty() else Console(width=160)
    shown = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=f"{counted(len(result.windows), 'window')}, {seconds:.1f} s",
        title_justify="left",
    )
    for name in ("window", "train", "test", "run"):
        shown.add_column(name, overflow="fold")
    for name in FIGURES:
        shown.add_column(name, justify="right")
    rows = zip(result.tasks, result.windows, result.window_metrics, strict=True)
    for k, (task, recorder, metrics) in enumerate(rows):
        segments = segments_of(task)
        spans = ["..".join(str(d)[:10] for d in segments[s]) for s in ("train", "test")]
        figures = [number(metrics.get(f)) for f in FIGURES]
        shown.add_row(str(k), *spans, str(recorder.id), *figures)
    metrics = result.recorder.list_metrics()
    shown.add_section()
    whole = [number(metrics.get(f)) for f in FIGURES]
    shown.add_row("all", "", "the stitched signal", str(result.recorder.id), *whole)
    console.print(shown)
    console.print(f"[dim]look at it:[/dim] {page_command()}", soft_wrap=True)
