"""`qtorch report`: write an HTML report of one run, or a comparison of several."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qtorch.cli.compose import compose_settings
from qtorch.cli.guard import configure_process, handle_stop_signals
from qtorch.cli.options import output_path
from qtorch.core.errors import ConfigError
from qtorch.core.session import resolve_path

USAGE = """\
qtorch report: HTML page of one run or several, readable without network or server

usage: qtorch report run=RUN_ID [out=FOLDER] [mode=sum] [tries=N]
       qtorch report "runs=[RUN_ID,...]" [out=FOLDER] [tries=N] [log=true]
       qtorch report sweep=NAME [out=FOLDER] [tries=N] [log=true]

  run    return, drawdown, cost, IC, quantiles, learning curves, all metrics of one run
  runs   several: runs grouped over seeds, paired tests, deflated Sharpe ratio, overfitting
         (one: as run)
  sweep  name or run ID of a sweep or search: a comparison of all its finished jobs
  out    folder for the page and its charts (PNG); default for several runs: comparison
  mode   returns of one run: sum (cumulated by addition) or product (compounded)
  tries  total number of strategies tried; default: all jobs of the runs' sweeps
  log    true: also log a comparison as artifacts of each run, under comparison/

With out=FOLDER the run is only read. Without it the page of one run is stored in the run, in place
of an earlier one, as the artifact report/report.html, and its numbers as metrics. The page shows
the output of the run's records and names the records that would add more.
"""
COMPARISON = "comparison"


def main(argv: Sequence[str]) -> int:
    """Load the runs and write the page."""
    from qtorch.cli.runs import find_run

    settings = compose_settings("report", argv)
    configure_process(tracking_uri=settings["tracking"].get("uri"))
    out = _output_folder(settings["out"])
    names = [name for name in ("run", "runs", "sweep") if settings[name] is not None]
    if len(names) != 1:
        raise ConfigError(
            "expected one of run=RUN_ID, runs=[RUN_ID,...] and sweep=NAME; got "
            f"{' and '.join(names) or 'none of them'}."
        )
    with handle_stop_signals():
        if settings["sweep"] is not None:
            recorders = _sweep_runs(str(settings["sweep"]), settings["tracking"].get("uri"))
        else:
            recorders = [find_run(run) for run in _run_ids(settings[names[0]])]
        if len(recorders) == 1:
            page = _report_run(recorders[0], settings, out)
        else:
            page = _compare_runs(recorders, settings, out or resolve_path(COMPARISON))
    print(page)
    return 0


def _report_run(recorder: Any, settings: dict[str, Any], out: Path | None) -> str:
    from qtorch.record.report.report import ReportRecord
    from qtorch.study.sweep import count_tried_jobs

    tries = settings["tries"]
    if tries is None:
        tries = count_tried_jobs([recorder])
    record = ReportRecord(recorder, mode=settings["mode"], tries=tries)
    if out is not None:
        out.mkdir(exist_ok=True)
        return f"{record.write(out)}: report of run {recorder.id}; nothing was stored in the run"
    record.generate()
    folder = Path(recorder.download_artifact(record.get_path()))
    return f"{folder / record.list()[0]}: report of run {recorder.id}, stored as its artifact"


def _compare_runs(recorders: Sequence[Any], settings: dict[str, Any], out: Path) -> str:
    from qtorch.study.comparison_page import write_comparison

    with TemporaryDirectory() as scratch:
        page = write_comparison(recorders, scratch, tries=settings["tries"])
        out.mkdir(exist_ok=True)
        is_replaced = (out / page.name).exists()
        for file in Path(scratch).iterdir():
            shutil.copy(file, out)
        if settings["log"]:
            for recorder in recorders:
                recorder.save_objects(scratch, artifact_path=COMPARISON)
    note = ", in place of the one that was there (out=FOLDER keeps both)" if is_replaced else ""
    return f"{out / page.name}: comparison of {len(recorders)} runs{note}"


def _sweep_runs(name: str, tracking_uri: str | None) -> list[Any]:
    """Return the recorders of the sweep's finished jobs; ConfigError for fewer than two."""
    from qtorch.cli.sweep import select_store_of_sweep
    from qtorch.study.sweep import find_sweep, list_finished_runs, sweep_jobs

    if not tracking_uri:
        select_store_of_sweep(name)
    recorders = list_finished_runs(sweep_jobs(find_sweep(name).id))
    if len(recorders) < 2:
        raise ConfigError(
            f"sweep={name}: a comparison needs two finished jobs, and it has {len(recorders)}; "
            f"`qtorch sweep show {name}` lists its jobs."
        )
    return recorders


def _run_ids(runs: Any) -> list[str]:
    """Return the distinct run IDs in their order."""
    ids = list(dict.fromkeys(map(str, runs if isinstance(runs, list) else [runs])))
    if not ids:
        raise ConfigError("runs=[]: expected at least one run ID, runs=[RUN_ID,...].")
    return ids


def _output_folder(out: str | None) -> Path | None:
    """Check and return the output folder, before any work is done."""
    if out is None:
        return None
    path = output_path(out)
    if path.is_file():
        raise ConfigError(f"out={out} is a file; expected a folder.")
    return path
