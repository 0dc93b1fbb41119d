"""`qtorch tracking`: what a tracking server did not get, delivered later."""

from __future__ import annotations

from collections.abc import Sequence

from qtorch.core.errors import ConfigError, unknown_name

USAGE = """\
qtorch tracking: deliver what was kept on disk while a tracking server did not answer

usage: qtorch tracking send [FOLDER]
"""


def main(argv: Sequence[str]) -> int:
    """Run `send`."""
    if not argv or any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] != "send":
        raise ConfigError(unknown_name("tracking command", argv[0], ("send",)))
    raise NotImplementedError
