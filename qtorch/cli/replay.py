"""`qtorch replay`: repeat a finished run from its recorded task and compare the results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qtorch.cli.guard import configure_process, handle_stop_signals
from qtorch.cli.options import parse_options, require_option

if TYPE_CHECKING:
    from qtorch.study.replay import Replay

USAGE = """\
qtorch replay: repeat a finished run and compare the results

usage: qtorch replay run=RUN_ID [experiment_name=...] [tracking.uri=...]

  run              the run ID, its first digits, a name, or latest
  experiment_name  experiment of the new run; default: that of the original run
  tracking.uri     the tracking store of the run

The task of the run is trained again in a new run (tag replay.of), with the same seed and number of
threads. Weights, every step of every metric, and scores are compared bit for bit. If they differ,
a table shows what else has changed: data, code (including your own modules), versions, device.

The results must be bit-equal on the same kind of CPU, and on the same GPU if it was trained with
trainer.deterministic=true. On another device, or without that, they must agree within 1%.

exit code: 0 if this holds, 1 if something differs (or could not be repeated)
"""
PARSERS = {"run": str, "experiment_name": str, "tracking.uri": str, "log_level": str}
VERDICTS = {True: ("equal", "green"), False: ("different", "red"), None: ("-", "dim")}
VERDICT_TEXTS = {
    "bit-equal": "results are equal, bit for bit",
    "tolerance": "results agree within 1%",
    "none": "results differ",
}


def main(argv: Sequence[str]) -> int:
    """Repeat the run and print the comparison; return 0 if the results are what they must be."""
    options = parse_options(argv, PARSERS, "replay")
    run_id = require_option(options, "run", "replay")
    configure_process(options.get("log_level") or "INFO", options.get("tracking.uri"))
    from qtorch.cli.runs import find_run
    from qtorch.study.replay import replay_run

    with handle_stop_signals():
        result = replay_run(
            str(find_run(run_id).id), experiment_name=options.get("experiment_name")
        )
    _print_result(result)
    return int(not result.is_kept)


def _print_result(result: Replay) -> None:
    from rich.text import Text

    from qtorch.cli.tables.console import new_table, print_table, terminal

    console = terminal()
    table = new_table("result", "", "details")
    for check in result.checks:
        table.add_row(check.name, Text(*VERDICTS[check.equal]), check.detail)
    print_table(table)
    if result.differences:
        table = new_table("difference", "original run", "this run")
        for difference in result.differences:
            table.add_row(
                difference.name, difference.original or "missing", difference.current or "missing"
            )
        print_table(table)
    elif not result.equal and result.unknown:
        console.print("everything that was recorded about the original run is the same.")
    elif not result.equal:
        same = "data, code, versions, threads and device"
        console.print(f"{same} are the same as in the original run.")
    for note in result.unknown:
        console.print(f"note: {note}")
    console.print(f"guarantee: {result.guarantee.kind} ({result.guarantee.reason})")
    verdict = VERDICT_TEXTS[result.strongest_guarantee]
    console.print(f"run {result.run.id} repeats {result.original.id}: {verdict}")
