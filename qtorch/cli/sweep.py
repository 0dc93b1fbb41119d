"""`qtorch sweep`: list, show and resume the sweeps of a tracking store, or find their best job."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from qtorch.cli.guard import configure_process
from qtorch.cli.options import parse_bool, parse_known_options
from qtorch.core.errors import ArgumentError, ConfigError, printable_text, unknown_name_message
from qtorch.core.secrets import redact_urls
from qtorch.core.session import set_defaults
from qtorch.tracking.lookup import select_store
from qtorch.tracking.store_types import NotInStoreError

USAGE = """\
qtorch sweep: manage the sweeps of `qtorch train -m`

usage: qtorch sweep list
       qtorch sweep show NAME
       qtorch sweep best NAME [metric="valid.IC"] [mode=max]
       qtorch sweep resume NAME [retry=true] [trusted=true]

  list     list the sweeps of the tracking store, newest first
  show     show the jobs of a sweep, statistics over seeds, the best job, and whether the best
           returns are more than the luck of many tries (qtorch report sweep=NAME: the page)
  best     show the best job and setting by a metric (default: Rank IC on the valid segment)
  resume   repeat the sweep's command in its folder: finished jobs are skipped, interrupted
           jobs resume from their checkpoints, failed jobs are retried with retry=true
           (a search continues its study); trusted=true: the stored command may contain words
           that run code, and names of classes that are not trusted otherwise

  NAME           name of the sweep, or its run ID
  tracking.uri   MLflow tracking URI; default: the store of this folder (or MLFLOW_TRACKING_URI);
                 if the sweep is not there, the store in which it was started
"""
PARSERS: dict[str, Callable[[str], Any]] = {
    "metric": str,
    "mode": str,
    "retry": parse_bool,
    "trusted": parse_bool,
    "tracking.uri": str,
}
ACTION_OPTIONS = {
    "list": (),
    "show": (),
    "best": ("metric", "mode"),
    "resume": ("retry", "trusted"),
}


def main(argv: Sequence[str]) -> int:
    """Run the action that the first word names."""
    action, *words = argv
    if action not in ACTION_OPTIONS:
        raise ArgumentError(unknown_name_message("action of qtorch sweep", action, ACTION_OPTIONS))
    allowed_options = (*ACTION_OPTIONS[action], "tracking.uri")
    options, names = parse_known_options(words, {o: PARSERS[o] for o in allowed_options})
    unknown_options = [w.partition("=")[0] for w in names if "=" in w]
    if unknown_options:
        subject = f"option of qtorch sweep {action}"
        raise ConfigError(unknown_name_message(subject, unknown_options[0], allowed_options))
    if len(names) != (action != "list"):
        expectation = "takes no name" if action == "list" else "takes the name of one sweep"
        raise ArgumentError(
            f"qtorch sweep {action} {expectation}; got {' '.join(names) or 'none'}."
        )
    configure_process(tracking_uri=options.get("tracking.uri"))
    with suppress(NotInStoreError):  # a sweep also names its store itself
        select_store()
    if action == "list":
        return _list()
    if not options.get("tracking.uri"):
        select_store_of_sweep(names[0])
    run_action = {"show": _show, "best": _best, "resume": _resume}[action]
    return run_action(names[0], options)


def select_store_of_sweep(name: str) -> None:
    """Use the store in which the sweep was started if this folder's store does not have it."""
    from qtorch.study.sweep import SWEEP_TAG, find_sweep_uri, list_sweeps

    has_store = _has_store()
    if has_store and any(name in (s.id, s.tags[SWEEP_TAG]) for s in list_sweeps()):
        return
    uri = find_sweep_uri(name)
    if uri is not None:
        set_defaults(tracking_uri=uri)
    elif not has_store:
        raise ConfigError(
            f"sweep {name!r} not found: this folder has no tracking store. Change to the sweep's "
            "folder, or add tracking.uri=..."
        )


def _has_store() -> bool:
    """Whether the tracking store exists; querying a missing one would create it."""
    from qtorch.tracking.locations import sqlite_path
    from qtorch.tracking.manager import R

    path = sqlite_path(R.get_uri())
    return path is None or path.exists()


def _list() -> int:
    from rich.console import Group

    from qtorch.cli.tables.console import (
        OverridesCell,
        format_status,
        new_table,
        print_table,
        terminal,
    )
    from qtorch.cli.tables.jobs import RUN_WIDTH, job_counts_text
    from qtorch.study.sweep import (
        COMMAND_TAG,
        SWEEP_TAG,
        add_repeats,
        get_job_count,
        list_sweeps,
        sweep_jobs,
    )
    from qtorch.tracking.claims import PROCESS_GONE, has_lost_process
    from qtorch.tracking.manager import R
    from qtorch.tracking.recorder import Recorder
    from qtorch.tracking.store_types import format_local_time

    sweeps = list_sweeps() if _has_store() else []
    if not sweeps:
        terminal().print("no sweeps yet; start one with: qtorch train -m model=lstm,gru seed=0,1,2")
        return 0
    is_narrow = terminal().width < RUN_WIDTH
    facts = ("status", "jobs", "started")
    columns = ("sweep, run, command", *facts) if is_narrow else ("sweep", *facts, "command", "run")
    table = new_table(*columns, no_wrap=("status", "started", "run"))
    if is_narrow:
        table.columns[2].max_width = 12  # of the jobs, so that run IDs have room
    for row in sweeps:
        jobs = add_repeats(sweep_jobs(row.id))
        name, command = row.tags[SWEEP_TAG], OverridesCell(row.tags.get(COMMAND_TAG, ""))
        cells = (
            format_status(Recorder.STATUS_K, PROCESS_GONE)
            if has_lost_process(row, R.get_uri())
            else format_status(row.status),
            job_counts_text(jobs, get_job_count(row)) if jobs else "none",
            (format_local_time(row.start_time) or "")[:16],
        )
        if is_narrow:
            table.add_row(Group(name, row.id, command), *cells)
        else:
            table.add_row(name, *cells, command, row.id)
    print_table(table)
    return 0


def _show(name: str, options: dict[str, Any]) -> int:
    from qtorch.cli.tables.jobs import print_sweep
    from qtorch.study.sweep import COMMAND_TAG, SWEEP_TAG, find_sweep, get_job_count, sweep_jobs

    row = find_sweep(name)
    jobs = sweep_jobs(row.id)
    print_sweep(row.tags[SWEEP_TAG], jobs, get_job_count(row), row.tags.get(COMMAND_TAG, ""))
    for job in (j for j in jobs if j.error):
        print(f"job {job.number}: {printable_text(str(job.error))}", file=sys.stderr)
    return 0


def _best(name: str, options: dict[str, Any]) -> int:
    from qtorch.cli.tables.jobs import print_best
    from qtorch.study.sweep import (
        COMMAND_TAG,
        common_overrides,
        find_sweep,
        seed_groups,
        sweep_jobs,
    )

    row = find_sweep(name)
    jobs, command = sweep_jobs(row.id), row.tags.get(COMMAND_TAG, "")
    common = common_overrides(jobs, command if len(jobs) > 1 else "")
    groups = seed_groups(jobs, command)
    print_best(jobs, groups, options.get("metric"), options.get("mode"), common)
    return 0


def _resume(name: str, options: dict[str, Any]) -> int:
    """Repeat each command of the sweep in its original folder; return the worst exit code."""
    from qtorch.cli import train
    from qtorch.cli.jobs.stored_command import check_stored_words, words_to_repeat
    from qtorch.cli.overrides import quote_value
    from qtorch.cli.workflow import command as workflow_command
    from qtorch.study.sweep import SWEEP_TAG, find_sweep, load_plan
    from qtorch.tracking.manager import R

    row, uri = find_sweep(name), R.get_uri()
    plan = load_plan(row.id)
    folder = Path(plan["folder"])
    if not folder.is_dir():
        raise ConfigError(
            f"the sweep was started in {folder}, which does not exist here: repeat its command "
            f"next to its data, with sweep.name={row.tags[SWEEP_TAG]}."
        )
    commands = [words_to_repeat(command["words"]) for command in plan["commands"]]
    if not options.get("trusted"):
        for words in commands:
            check_stored_words(words)
    os.chdir(folder)
    extra_overrides = [
        f"sweep.stored={not options.get('trusted')}",
        f"sweep.name={row.tags[SWEEP_TAG]}",
        "sweep.retry=" + str(bool(options.get("retry"))),
        f"tracking.uri={quote_value(redact_urls(uri))}",  # completed by the command
    ]
    codes = []
    workflows = plan.get("workflows", {})
    for words in commands:
        name = "run" if workflows else "train"
        print(f"in {folder}: qtorch {name} -m {shlex.join(words)}", file=sys.stderr)
        arguments = ["-m", *words, *extra_overrides]
        if workflows:
            is_trusted = bool(options.get("trusted"))
            codes.append(workflow_command.resume(arguments, workflows, is_trusted=is_trusted))
        else:
            codes.append(train.main(arguments))
    return max(codes)
