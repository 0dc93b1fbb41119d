"""`qtorch runs`: list the runs of a store; and how other commands find a run and load it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from qtorch.cli.guard import configure_process
from qtorch.cli.options import parse_count, parse_options
from qtorch.core.errors import ConfigError, check_name, unknown_name_message
from qtorch.core.instantiate import init_instance_by_config
from qtorch.study.sweep import JOB_TAG, SWEEP_TAG
from qtorch.tracking.claims import PROCESS_GONE, has_lost_process
from qtorch.tracking.lookup import list_runs, select_run, select_store
from qtorch.tracking.manager import R
from qtorch.tracking.recorder import HOST_TAG, Recorder
from qtorch.tracking.store_types import RunRow, format_local_time

USAGE = """\
qtorch runs: list the runs of the tracking store, newest first

usage: qtorch runs [experiment=NAME] [status=FINISHED] [filter=EXPRESSION] [columns=NAME,...]
                   [limit=20] [tracking.uri=URI]

  experiment    runs of this experiment; default: of all
  status        RUNNING, FINISHED, FAILED or KILLED; a run whose process is gone counts as KILLED,
                also if it is still RUNNING in the store
  filter        MLflow's search syntax: filter='metrics.`test.IC` > 0.02 and params.seed = "1"'
  columns       metrics, params or tags to show: columns=test.IC,model.network._target_,seed
                default: IC and Rank IC of the test segment
  limit         number of runs
  tracking.uri  MLflow tracking URI; default: MLFLOW_TRACKING_URI, the store of this folder or of
                the nearest folder above

Where a command takes run=..., it accepts a run ID, its first digits (four or more), the name of a
run (its newest), or `latest`: the newest finished run.
"""
PARSERS: dict[str, Callable[[str], Any]] = {
    "experiment": str,
    "status": str,
    "filter": str,
    "columns": str,
    "limit": parse_count,
    "tracking.uri": str,
}
DEFAULT_LIMIT = 20
FIGURES = ("IC", "Rank IC")


def main(argv: Sequence[str]) -> int:
    """Print a table of runs."""
    options = parse_options(argv, PARSERS, "qtorch runs")
    configure_process(tracking_uri=options.get("tracking.uri"))
    select_store()
    status = options.get("status")
    if status is not None:
        status = status.upper()
        check_name("status", status, Recorder.STATUSES)
    limit = options.get("limit") or DEFAULT_LIMIT
    rows = _find_rows(options.get("experiment"), status, options.get("filter"), limit)
    lost_ids = {row.id for row in rows if has_lost_process(row, R.get_uri())}
    columns = options.get("columns")
    column_names = None if columns is None else [c.strip() for c in columns.split(",")]
    _print_rows(rows, column_names, lost_ids)
    return 0


def _find_rows(
    experiment: str | None, status: str | None, condition: str | None, limit: int
) -> list[RunRow]:
    """Return the newest runs with a status, at most `limit`.

    A run whose process is gone has the status KILLED here, although the store says RUNNING.
    """

    def search(stored_status: str | None, max_results: int | None) -> list[RunRow]:
        part = stored_status and f"attributes.status = '{stored_status}'"
        text = " and ".join(filter(None, [condition, part]))
        return list_runs(experiment, filter_string=text, max_results=max_results)

    if status not in (Recorder.STATUS_R, Recorder.STATUS_K):
        return search(status, limit)
    has_status = status == Recorder.STATUS_K
    rows = search(status, limit) if has_status else []
    rows += [
        row
        for row in search(Recorder.STATUS_R, None)
        if has_lost_process(row, R.get_uri()) == has_status
    ]
    return sorted(rows, key=lambda row: row.start_time or 0, reverse=True)[:limit]


def _print_rows(
    rows: Sequence[RunRow], columns: Sequence[str] | None, lost_ids: Collection[str]
) -> None:
    from qtorch.cli.tables.console import format_status, new_table, print_table, terminal

    if not rows:
        terminal().print("no runs; start one with: qtorch train")
        return
    names = {e.id: name for name, e in R.list_experiments().items()}
    shown_columns = FIGURES if columns is None else columns
    table = new_table(
        *("run", "name", "experiment", "status", "started"),
        *shown_columns,
        numbers=shown_columns if columns is None else (),
        no_wrap=("run", "status", "started"),
    )
    for row in rows:
        values = (
            [row.metrics.get(f"test.{f}", row.metrics.get(f)) for f in FIGURES]
            if columns is None
            else [find_value(row, c) for c in columns]
        )
        table.add_row(
            row.id[:12],
            row.name,
            names.get(row.experiment_id, row.experiment_id),
            format_status(Recorder.STATUS_K, PROCESS_GONE)
            if row.id in lost_ids
            else format_status(row.status),
            (format_local_time(row.start_time) or "")[:16],
            *("-" if v is None else v if isinstance(v, str) else f"{v:.4f}" for v in values),
        )
    print_table(table)
    for row in (r for r in rows if r.id in lost_ids):
        print(f"resume run {row.id[:12]}: {resume_command(row)}")


def resume_command(row: RunRow) -> str:
    """Return what resumes a run: a command, that of its sweep if it is a job of one, or a call."""
    from qtorch.study.rolling_resume import STUDY_TAG, WINDOW_TAG

    if STUDY_TAG in row.tags or WINDOW_TAG in row.tags:
        return "repeat the command of its rolling study, which keeps the windows that have finished"
    job_tag = next((t for t in row.tags if t.startswith(JOB_TAG)), None)
    if SWEEP_TAG in row.tags or job_tag is not None:
        return f"qtorch sweep resume {row.id if job_tag is None else job_tag.removeprefix(JOB_TAG)}"
    if any(name.startswith("rolling.") for name in row.params):
        return "start its rolling study again, which trains its windows in new runs"
    if HOST_TAG not in row.tags:
        return f"R.start(recorder_id='{row.id}', resume=True) in the program that started it"
    return f"qtorch train resume={row.id}"


def find_value(row: RunRow, name: str) -> float | str | None:
    """Return the metric, param or tag of a run with this name, or None."""
    mappings: tuple[Mapping[str, float | str], ...] = (row.metrics, row.params, row.tags)
    for values in mappings:
        if name in values:
            return values[name]
    return None


def find_run(text: object) -> Recorder:
    """Return the run that `run=...` names, see `select_run`; `latest` is a finished training.

    Digits without a letter are a number for Hydra.
    """
    return select_run(str(text), status=Recorder.STATUS_FI, without_tags=(SWEEP_TAG,))


def load_finished_run(run: object) -> Recorder:
    """Return the run that `run=...` names; raise ConfigError unless it is finished."""
    recorder = find_run(run)
    if recorder.status != Recorder.STATUS_FI:
        raise ConfigError(
            f"run {recorder.id} is {recorder.status}; only a finished run has a fitted model."
        )
    return recorder


def load_model_and_dataset(
    recorder: Recorder, source: dict[str, Any] | None, *, allow_nonfinite: bool
) -> tuple[Any, Any]:
    """Load a run's model and dataset.

    If `source` is given, the dataset reads that source with the run's fitted processors.
    `allow_nonfinite` sets this attribute of the model, see `LightningModel`.
    """
    model, dataset = recorder.load_object("params.pkl"), recorder.load_object("dataset")
    if allow_nonfinite:
        model.allow_nonfinite = True
    if source is not None:
        dataset.setup_data(source=init_instance_by_config(source))
    return model, dataset


def parse_segment(segment: Any, dataset: Any) -> Any:
    """Return a segment's name, or two dates as a slice; raise ConfigError for an unknown name."""
    if isinstance(segment, list | tuple):
        if len(segment) != 2:
            raise ConfigError(f"segment={segment}: expected a name or two dates.")
        return slice(*(str(date) for date in segment))
    segments = getattr(dataset, "segments", {})
    if segment not in segments:
        raise ConfigError(unknown_name_message("segment", str(segment), segments))
    return segment
