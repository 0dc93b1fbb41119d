"""What a search says at its end: its trials by value, the best, what mattered, a picture."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from qtorch.cli.table import number
from qtorch.core.errors import QtorchError
from qtorch.core.wording import counted
from qtorch.tracking.locations import redacted
from qtorch.tracking.trials.row import TrialRow

if TYPE_CHECKING:
    from qtorch.tracking.trials.study import Trials

log = logging.getLogger(__name__)

STYLE = {"COMPLETE": "green", "PRUNED": "yellow", "FAIL": "red", "RUNNING": "cyan"}
PICTURE, RECORD = "search.png", "search.json"
FORMAT = 1


def show_study(study: Trials, metric: str, folder: Path, parent: str | None) -> None:
    """Print the table; the picture and the trials as JSON go into the sweep's folder, and into
    the sweep's own run where it has one."""
    rows, maximize = study.rows(), study.direction == "maximize"
    shares = study.importances()
    _print(study, rows, metric, shares, maximize)
    held = [folder / RECORD]
    told = {"format": FORMAT, "study": study.name, "metric": metric, "direction": study.direction}
    told |= {"storage": redacted(study.url), "importances": shares}
    held[0].write_text(json.dumps({**told, "trials": [asdict(r) for r in rows]}, indent=1))
    if any(r.value is not None for r in rows):
        from qtorch.study.search_chart import search_chart

        figure = search_chart(rows, metric, maximize=maximize, importances=shares)
        figure.savefig(folder / PICTURE, dpi=120)
        held.append(folder / PICTURE)
    if parent is not None:
        _keep(parent, held)
    _console().print(f"[dim]look at it:[/dim] {held[-1]}", soft_wrap=True)


def _print(
    study: Trials, rows: Sequence[TrialRow], metric: str, shares: dict[str, float], maximize: bool
) -> None:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    ended = sum(r.state in ("COMPLETE", "PRUNED") for r in rows)
    shown.title = f"study {study.name}: {counted(ended, 'trial')} by {metric}"
    names = list(dict.fromkeys(n for r in rows for n in r.params))
    shown.add_column("trial", justify="right")
    shown.add_column("status")
    shown.add_column(metric, justify="right")
    for name in names:
        shown.add_column(name, justify="right", overflow="fold")
    for name in ("epochs", "run"):
        shown.add_column(name, overflow="fold", justify="right" if name == "epochs" else "left")
    for row in sorted(rows, key=lambda r: _order(r, maximize)):
        style = STYLE.get(row.state, "dim") if not row.replaced else "dim"
        shown.add_row(
            str(row.number),
            f"[{style}]{row.state}[/{style}]",
            number(row.value),
            *(_shown(row.params.get(n)) for n in names),
            str(row.steps or "-"),
            _outcome(row),
        )
    _console().print(shown)
    done = [r for r in rows if r.state == "COMPLETE" and r.value is not None]
    if done:
        best = min(done, key=lambda r: _order(r, maximize))
        chosen = " ".join(f"{n}={_shown(v)}" for n, v in best.params.items())
        _console().print(
            f"best: trial {best.number}, {metric} {number(best.value)}, run {best.run_id}"
        )
        _console().print(f"      {chosen}", soft_wrap=True)
    if shares:
        listed = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        _console().print(f"what mattered: {listed}", soft_wrap=True)


def _order(row: TrialRow, maximize: bool) -> tuple[int, float, int]:
    """Finished ones by value, then pruned ones, then the others by number."""
    rank = {"COMPLETE": 0, "PRUNED": 1}.get(row.state, 2)
    value = row.value if row.value is not None and rank < 2 else 0.0
    return rank, -value if maximize else value, row.number


def _outcome(row: TrialRow) -> str:
    """The run; why there is none, or what became of it."""
    if row.replaced and row.run_id:
        return "failed, tried again"
    return row.run_id or (row.error or "-")[:60]


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _keep(parent: str, files: Sequence[Path]) -> None:
    """The files as artifacts of the sweep's run."""
    from qtorch.tracking.r import R

    try:
        run = R.get_recorder(recorder_id=parent)
        for path in files:
            run.log_artifact(path)
    except QtorchError as error:
        log.warning("the search's picture is not kept in run %s: %s", parent, error)


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=160)
