"""`qtorch tracking`: what a tracking server did not get, delivered later."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qtorch.core.errors import ConfigError, unknown_name

USAGE = """\
qtorch tracking: deliver what was kept on disk while a tracking store did not answer

usage: qtorch tracking send [run=RUN_ID] [folder=FOLDER] [tracking.uri=URI]

  run           one run alone
  folder        another folder than this user's outbox
  tracking.uri  where to; by default where it was meant for (needed if that had a password)
"""
ACTIONS = ("send",)
OPTIONS = ("run", "folder", "tracking.uri")


def main(argv: Sequence[str]) -> int:
    """Run `send`: 0 where everything was delivered or nothing waits, else 1."""
    if not argv or any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] not in ACTIONS:
        raise ConfigError(unknown_name("tracking command", argv[0], ACTIONS))
    options = dict(_option(word) for word in argv[1:])

    from qtorch.tracking.outbox import send

    reports = send(
        options.get("run"),
        tracking_uri=options.get("tracking.uri"),
        folder=options.get("folder"),
    )
    if not reports:
        print("nothing waits to be delivered.")
    failed = False
    for report in reports:
        print(f"run {report.run_id}: {report.sent} sent, {report.already_there} were there already")
        problems = [*report.refused, *([report.error] if report.error else [])]
        for problem in problems:
            failed = True
            print(f"error: run {report.run_id}: {' '.join(problem.split())}", file=sys.stderr)
    return int(failed)


def _option(word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not equals or name not in OPTIONS:
        raise ConfigError(unknown_name("option of tracking send", name, OPTIONS))
    return name, value
