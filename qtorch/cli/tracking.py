"""`qtorch tracking`: deliver data that a tracking server could not receive earlier."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qtorch.cli.options import parse_options
from qtorch.core.errors import ConfigError, printable_text, unknown_name_message
from qtorch.core.secrets import redact_urls

USAGE = """\
qtorch tracking: deliver data that was stored on disk while the tracking store was unreachable

usage: qtorch tracking send [run=RUN_ID] [folder=FOLDER] [tracking.uri=URI]

  run           only this run
  folder        outbox folder; default: the outbox of this user
  tracking.uri  destination; default: the original store (its password, if it has one, is taken
                from MLFLOW_TRACKING_URI)
"""
ACTIONS = ("send",)
PARSERS = {"run": str, "folder": str, "tracking.uri": str}


def main(argv: Sequence[str]) -> int:
    """Run `send`; return 0 if everything was delivered or nothing was pending, otherwise 1."""
    if argv[0] not in ACTIONS:
        raise ConfigError(unknown_name_message("tracking command", argv[0], ACTIONS))
    options = parse_options(argv[1:], PARSERS, "tracking send")

    from qtorch.tracking.delivery import send_outbox

    reports = send_outbox(
        options.get("run"),
        tracking_uri=options.get("tracking.uri"),
        folder=options.get("folder"),
    )
    if not reports:
        print("nothing to deliver.")
    has_failed = False
    for report in reports:
        print(
            f"run {report.run_id}: {report.num_sent} sent, {report.num_skipped} already delivered"
        )
        problems = [*report.rejections, *([report.error] if report.error else [])]
        for problem in problems:
            has_failed = True
            text = printable_text(redact_urls(" ".join(problem.split())))
            print(f"error: run {report.run_id}: {text}", file=sys.stderr)
    return int(has_failed)
