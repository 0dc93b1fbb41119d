"""`qtorch replay`: repeat a finished run from its recorded task and compare the results."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qtorch.cli.guard import handle_stop_signals
from qtorch.cli.options import parse_options, require_option
from qtorch.core.runtime import configure_logging
from qtorch.core.session import init

if TYPE_CHECKING:
    from qtorch.study.replay import Replay

USAGE = """\
qtorch replay: repeat a finished run and compare the results

usage: qtorch replay run=RUN_ID [experiment_name=...] [tracking.uri=...]

  run              the run ID
  experiment_name  experiment of the new run; default: that of the original run
  tracking.uri     the tracking store of the run

The task of the run is trained again in a new run (tag replay.of), with the same seed and number of
threads. Weights, every step of every metric, and scores are compared bit for bit. If they differ,
a table shows what else has changed: data, code (including your own modules), versions, device.

exit code: 0 if everything is equal, 1 if something differs (or could not be repeated)
"""
PARSERS = {"run": str, "experiment_name": str, "tracking.uri": str, "log_level": str}
SIGN = {True: "[green]equal[/green]", False: "[red]different[/red]", None: "[dim]-[/dim]"}


def main(argv: Sequence[str]) -> int:
    """Repeat the run and print the comparison; return 0 if every number is equal."""
    if any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0
    options = parse_options(argv, PARSERS, "replay")
    run_id = require_option(options, "run", "replay")
    configure_logging(options.get("log_level") or "INFO")
    if options.get("tracking.uri") is not None:
        init(tracking_uri=options["tracking.uri"])
    from qtorch.study.replay import replay_run

    with handle_stop_signals():
        result = replay_run(run_id, experiment_name=options.get("experiment_name"))
    _print_result(result)
    return int(not result.equal)


def _print_result(result: Replay) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=160)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("result", "", "details"):
        table.add_column(name)
    for check in result.checks:
        table.add_row(check.name, SIGN[check.equal], check.detail)
    console.print(table)
    if result.differences:
        difference_table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("difference", "original run", "this run"):
            difference_table.add_column(name, overflow="fold")
        for difference in result.differences:
            difference_table.add_row(
                difference.name, difference.original or "missing", difference.current or "missing"
            )
        console.print(difference_table)
    elif not result.equal:
        same = "data, code, versions, threads and device are the same as in the original run."
        console.print(
            "everything that was recorded about the original run is the same."
            if result.unknown
            else same
        )
    for note in result.unknown:
        console.print(f"note: {note}")
    verdict = "results are equal" if result.equal else "results differ"
    console.print(f"run {result.run.id} repeats {result.original.id}: {verdict}")
