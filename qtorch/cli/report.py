"""`qtorch report`: a run, or the comparison of several, as one HTML page."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qtorch.cli.compose import composed
from qtorch.cli.signals import interruptible
from qtorch.core.errors import ConfigError
from qtorch.core.runtime import configure_logging
from qtorch.core.session import init

USAGE = """\
qtorch report: runs as a page that needs no network and no server

usage: qtorch report runs=[RUN_ID,...] [out=FOLDER] [mode=sum] [tries=N] [log=true]

  runs   one id: return, drawdown, cost, IC, quantiles, learning curves, all metrics of the run
         several: seeds in groups, paired tests, the deflated Sharpe ratio
  out    a folder for the page and its pictures (PNG); several runs: comparison by default
  mode   one run's returns: sum (added up) or product (compounded)
  tries  how many strategies were tried in all; by default as many as runs are given
  log    true: a comparison goes to the artifacts of each run too, under comparison/

The page of one run is an artifact of the run, report/report.html, and its numbers are metrics of
the run. It shows what the run's records left and says which record to add for the rest.
"""
COMPARISON = "comparison"


def main(argv: Sequence[str]) -> int:
    """Find the runs, make the page."""
    if any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0
    settings = composed("report", argv)
    configure_logging()
    ids = _ids(settings["runs"])
    out = _folder(settings["out"])
    if settings["tracking"].get("uri") is not None:
        init(tracking_uri=settings["tracking"]["uri"])
    from qtorch.tracking.r import R

    with interruptible():
        recorders = [R.get_recorder(recorder_id=run) for run in ids]
        if len(recorders) == 1:
            page = _one(recorders[0], settings, out)
        else:
            page = _several(recorders, settings, out or Path(COMPARISON))
    print(page)
    return 0


def _one(recorder: Any, settings: dict[str, Any], out: Path | None) -> str:
    from qtorch.record.report import ReportRecord

    tries = 1 if settings["tries"] is None else settings["tries"]
    record = ReportRecord(recorder, mode=settings["mode"], tries=tries)
    record.generate()
    folder = Path(recorder.download_artifact(record.get_path()))
    if out is not None:
        shutil.copytree(folder, out, dirs_exist_ok=True)
        folder = out
    return f"{folder / record.list()[0]}: the report of run {recorder.id}, an artifact of it"


def _several(recorders: Sequence[Any], settings: dict[str, Any], out: Path) -> str:
    from qtorch.study.comparison_page import write_comparison

    with TemporaryDirectory() as scratch:
        page = write_comparison(recorders, scratch, tries=settings["tries"])
        out.mkdir(exist_ok=True)
        for file in Path(scratch).iterdir():
            shutil.copy(file, out)
        if settings["log"]:
            for recorder in recorders:
                recorder.save_objects(scratch, artifact_path=COMPARISON)
    return f"{out / page.name}: the comparison of {len(recorders)} runs"


def _ids(given: Any) -> list[str]:
    """The ids, each once, in their order."""
    ids = list(dict.fromkeys(map(str, given if isinstance(given, list) else [given])))
    if not ids:
        raise ConfigError("runs=[]: name one run at least, runs=[RUN_ID,...].")
    return ids


def _folder(given: str | None) -> Path | None:
    """The folder to write; decided before the work, not after it."""
    if given is None:
        return None
    path = Path(given).expanduser()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"out={given} is a file; name a folder.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"out={given}: there is no folder {path.absolute().parent}.")
    return path
