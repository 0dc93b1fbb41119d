"""Report a search: print its trials, and write a chart and a JSON file."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from qtorch.cli.tables.console import (
    STATUS_STYLES,
    format_number,
    new_table,
    print_table,
    terminal,
    with_label,
)
from qtorch.core.errors import QtorchError, format_count
from qtorch.core.secrets import redact_urls
from qtorch.study.search.trial import TrialRow
from qtorch.tracking.manager import R

if TYPE_CHECKING:
    from qtorch.study.search.study import SharedStudy

log = logging.getLogger(__name__)

CHART_FILE, TRIALS_FILE = "search.png", "search.json"
FORMAT_VERSION = 1  # of search.json


def report_study(study: SharedStudy, metric: str, folder: Path, sweep_run_id: str | None) -> None:
    """Print the trials, and write a chart and a JSON file.

    Both files go into the sweep's folder, and into the sweep's run if there is one.
    """
    rows, maximize = study.rows(), study.direction == "maximize"
    importances = study.importances()
    _print_trials(study, rows, metric, importances, maximize)
    paths = [folder / TRIALS_FILE]
    record = {
        "format": FORMAT_VERSION,
        "study": study.name,
        "metric": metric,
        "direction": study.direction,
        "storage": redact_urls(study.url),
        "importances": importances,
        "trials": [asdict(r) for r in rows],
    }
    paths[0].write_text(json.dumps(record, indent=1))
    if any(r.value is not None for r in rows):
        from qtorch.study.search.chart import search_chart

        figure = search_chart(rows, metric, maximize=maximize, importances=importances)
        figure.savefig(folder / CHART_FILE, dpi=120)
        paths.append(folder / CHART_FILE)
    if sweep_run_id is not None:
        _log_artifacts(sweep_run_id, paths)
    terminal().print(with_label("saved to:", str(paths[-1])), soft_wrap=True)


def _print_trials(
    study: SharedStudy,
    rows: Sequence[TrialRow],
    metric: str,
    importances: dict[str, float],
    maximize: bool,
) -> None:
    console = terminal()
    num_ended = sum(r.state in ("COMPLETE", "PRUNED") for r in rows)
    names = list(dict.fromkeys(n for r in rows for n in r.params))
    table = new_table(
        *("trial", "status", metric, *names, "epochs", "run"),
        title=f"study {study.name}: {format_count(num_ended, 'trial')} by {metric}",
        numbers=("trial", metric, "epochs"),
    )
    for row in sorted(rows, key=lambda r: _sort_key(r, maximize)):
        style = "dim" if row.replaced else STATUS_STYLES.get(row.state, "dim")
        table.add_row(
            str(row.number),
            Text(row.state, style=style),
            format_number(row.value),
            *(_format_value(row.params.get(n)) for n in names),
            str(row.steps or "-"),
            _outcome(row),
        )
    print_table(table)
    complete_trials = [r for r in rows if r.state == "COMPLETE" and r.value is not None]
    if complete_trials:
        best = min(complete_trials, key=lambda r: _sort_key(r, maximize))
        best_params = " ".join(f"{n}={_format_value(v)}" for n, v in best.params.items())
        console.print(
            f"best: trial {best.number}, {metric} {format_number(best.value)}, run {best.run_id}"
        )
        console.print(f"      {best_params}", soft_wrap=True)
    if importances:
        importance_text = ", ".join(f"{name} {share:.0%}" for name, share in importances.items())
        console.print(f"importance: {importance_text}", soft_wrap=True)


def _sort_key(row: TrialRow, maximize: bool) -> tuple[int, float, int]:
    """Sort complete trials by value, then pruned ones by value, then the others by number."""
    rank = {"COMPLETE": 0, "PRUNED": 1}.get(row.state, 2)
    value = row.value if row.value is not None and rank < 2 else 0.0
    return rank, -value if maximize else value, row.number


def _outcome(row: TrialRow) -> str:
    """Return the run ID; or why there is none, or that the trial was retried."""
    if row.replaced and row.run_id:
        return "failed, retried"
    return row.run_id or (row.error or "-")[:60]


def _format_value(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _log_artifacts(sweep_run_id: str, files: Sequence[Path]) -> None:
    """Log the files as artifacts of the sweep's run."""
    try:
        run = R.get_recorder(recorder_id=sweep_run_id)
        for path in files:
            run.log_artifact(path)
    except QtorchError as error:
        log.warning("cannot log the search's files in run %s: %s", sweep_run_id, error)
