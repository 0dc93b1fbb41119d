"""`qtorch sweep`: the sweeps of a tracking store; show one, find its best, take it up again."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qtorch.cli.options import known_options, switch
from qtorch.core.errors import ArgumentError, ConfigError, unknown_name

USAGE = """\
qtorch sweep: what `qtorch train -m` has begun

usage: qtorch sweep list
       qtorch sweep show NAME
       qtorch sweep best NAME [metric="valid.IC"] [mode=max]
       qtorch sweep resume NAME [retry=true]

  list     every sweep of the tracking store, the newest first
  show     its jobs, mean and deviation over seeds, the best job
  best     the best job and the best setting by a metric (the valid segment's Rank IC)
  resume   the sweep's command again, in its folder: finished jobs are skipped, interrupted ones
           go on from their checkpoints, and with retry=true failed ones are tried again
           (a search goes on with its study)

  NAME           the sweep's name, or the id of its run
  tracking.uri   MLflow's store; by default the one of this folder (or MLFLOW_TRACKING_URI), and
                 for a sweep that is not there the store that you began it in
"""
READERS: dict[str, Callable[[str], Any]] = {
    "metric": str,
    "mode": str,
    "retry": switch,
    "tracking.uri": str,
}
TAKEN = {"list": (), "show": (), "best": ("metric", "mode"), "resume": ("retry",)}


def main(argv: Sequence[str]) -> int:
    """Do what the first word says."""
    if not argv or any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0 if argv else 2
    action, *words = argv
    if action not in TAKEN:
        raise ArgumentError(unknown_name("action of qtorch sweep", action, TAKEN))
    options, rest = known_options(words, READERS)
    allowed = (*TAKEN[action], "tracking.uri")
    wrong = [w.partition("=")[0] for w in rest if "=" in w] + [
        o for o in options if o not in allowed
    ]
    if wrong:
        raise ConfigError(unknown_name(f"option of qtorch sweep {action}", wrong[0], allowed))
    if len(rest) != (action != "list"):
        takes = "takes no name" if action == "list" else "takes the name of one sweep"
        raise ArgumentError(f"qtorch sweep {action} {takes}; got {' '.join(rest) or 'none'}.")
    from qtorch.cli.work import quiet_libraries
    from qtorch.core.session import init

    quiet_libraries()
    if options.get("tracking.uri"):
        init(tracking_uri=options["tracking.uri"])
    if action == "list":
        return _list()
    if not options.get("tracking.uri"):
        _look_elsewhere(rest[0])
    act = {"show": _show, "best": _best, "resume": _resume}[action]
    return act(rest[0], options)


def _look_elsewhere(named: str) -> None:
    """Take the store that a sweep was begun in, where this folder's has none of that name."""
    from qtorch.core.session import init
    from qtorch.study.sweep import SWEEP_TAG, list_sweeps, registered_uri

    here = _has_store()
    if here and any(named in (s.id, s.tags[SWEEP_TAG]) for s in list_sweeps()):
        return
    uri = registered_uri(named)
    if uri is not None:
        init(tracking_uri=uri)
    elif not here:
        raise ConfigError(
            f"there is no sweep {named!r}: this folder has no tracking store. Go to the sweep's "
            "folder, or give tracking.uri=..."
        )


def _has_store() -> bool:
    """Whether there is a tracking store: asking one that is not there would make it."""
    from qtorch.tracking.locations import sqlite_path
    from qtorch.tracking.r import R

    path = sqlite_path(R.get_uri())
    return path is None or path.exists()


def _list() -> int:
    from rich import box
    from rich.table import Table

    from qtorch.cli.sweep_table import counts_text
    from qtorch.cli.table import STATUS_STYLE, terminal
    from qtorch.study.sweep import COMMAND_TAG, SWEEP_TAG, count_of, list_sweeps, sweep_jobs
    from qtorch.tracking.limits import local_time

    sweeps = list_sweeps() if _has_store() else []
    if not sweeps:
        terminal().print("no sweep yet: qtorch train -m model=lstm,gru seed=0,1,2 begins one.")
        return 0
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("sweep", "status", "jobs", "begun", "command", "run"):
        shown.add_column(name, overflow="fold")
    for row in sweeps:
        jobs = sweep_jobs(row.id)
        style = STATUS_STYLE.get(row.status, "")
        shown.add_row(
            row.tags[SWEEP_TAG],
            f"[{style}]{row.status}[/{style}]" if style else row.status,
            counts_text(jobs, count_of(row)) if jobs else "none",
            (local_time(row.start_time) or "")[:16],
            row.tags.get(COMMAND_TAG, ""),
            row.id,
        )
    terminal().print(shown)
    return 0


def _show(named: str, options: dict[str, Any]) -> int:
    from qtorch.cli.sweep_table import print_sweep
    from qtorch.study.sweep import COMMAND_TAG, SWEEP_TAG, count_of, find_sweep, sweep_jobs

    row = find_sweep(named)
    jobs = sweep_jobs(row.id)
    print_sweep(row.tags[SWEEP_TAG], jobs, count_of(row), row.tags.get(COMMAND_TAG, ""))
    for job in (j for j in jobs if j.error):
        print(f"job {job.number}: {job.error}", file=sys.stderr)
    return 0


def _best(named: str, options: dict[str, Any]) -> int:
    from qtorch.cli.sweep_table import print_best
    from qtorch.study.sweep import find_sweep, sweep_jobs
    from qtorch.study.sweep_groups import seed_groups

    jobs = sweep_jobs(find_sweep(named).id)
    print_best(jobs, seed_groups(jobs), options.get("metric"), options.get("mode"))
    return 0


def _resume(named: str, options: dict[str, Any]) -> int:
    """Each command of the sweep, as it was typed, in the folder where it was; the worst code."""
    from qtorch.cli import train
    from qtorch.study.sweep import SWEEP_TAG, find_sweep, plan_of
    from qtorch.tracking.locations import redacted
    from qtorch.tracking.r import R

    row, uri = find_sweep(named), R.get_uri()
    plan = plan_of(row.id)
    folder = Path(plan["folder"])
    if not folder.is_dir():
        raise ConfigError(
            f"the sweep was begun in {folder}, which is not here: repeat its command where its "
            f"data are, with sweep.name={row.tags[SWEEP_TAG]}."
        )
    os.chdir(folder)
    added = [f"sweep.name={row.tags[SWEEP_TAG]}", "sweep.retry=" + str(bool(options.get("retry")))]
    if redacted(uri) == uri:
        added.append(f"tracking.uri='{uri}'")
    else:
        os.environ["MLFLOW_TRACKING_URI"] = uri
    codes = []
    for command in plan["commands"]:
        print(f"in {folder}: qtorch train -m {shlex.join(command['words'])}", file=sys.stderr)
        codes.append(train.main(["-m", *command["words"], *added]))
    return max(codes)
