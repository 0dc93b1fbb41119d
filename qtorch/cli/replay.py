"""`qtorch replay`: a finished run once more, from its own record, and whether the numbers agree."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qtorch.cli.options import needed, options_of
from qtorch.cli.signals import interruptible
from qtorch.core.runtime import configure_logging
from qtorch.core.session import init

if TYPE_CHECKING:
    from qtorch.study.replay import Replay

USAGE = """\
qtorch replay: repeat a finished run from its own record, and compare

usage: qtorch replay run=RUN_ID [experiment_name=...] [tracking.uri=...]

  run              the run's id
  experiment_name  of the new run; by default the old one's
  tracking.uri     the store that holds the run

The run's own task is trained again, with its seed and its number of threads, in a new run (tag
replay.of). Weights, every step of every metric and the scores are compared bit for bit. Where they
differ, the table says what else does: data, code (of your own modules too), versions, device.

exit code: 0 all equal, 1 something differs (or could not be repeated)
"""
READERS = {"run": str, "experiment_name": str, "tracking.uri": str, "log_level": str}
SIGN = {True: "[green]equal[/green]", False: "[red]different[/red]", None: "[dim]-[/dim]"}


def main(argv: Sequence[str]) -> int:
    """Repeat, compare, tell; 0 where every number came out equal."""
    if any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0
    options = options_of(argv, READERS, "replay")
    run_id = needed(options, "run", "replay")
    configure_logging(options.get("log_level") or "INFO")
    if options.get("tracking.uri") is not None:
        init(tracking_uri=options["tracking.uri"])
    from qtorch.study.replay import replay_run

    with interruptible():
        found = replay_run(run_id, experiment_name=options.get("experiment_name"))
    _print(found)
    return int(not found.equal)


def _print(found: Replay) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=160)
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("numbers", "", "what"):
        shown.add_column(name)
    for number in found.numbers:
        shown.add_row(number.what, SIGN[number.equal], number.told)
    console.print(shown)
    if found.differences:
        other = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("what differs", "then", "now"):
            other.add_column(name, overflow="fold")
        for each in found.differences:
            other.add_row(each.what, each.then or "not there", each.now or "not there")
        console.print(other)
    elif not found.equal:
        same = "data, code, versions, threads and device are the same as then."
        console.print("what is known of then is the same now." if found.unknown else same)
    for told in found.unknown:
        console.print(f"note: {told}")
    verdict = "the same numbers" if found.equal else "other numbers"
    console.print(f"run {found.run.id} repeats {found.original.id}: {verdict}")
