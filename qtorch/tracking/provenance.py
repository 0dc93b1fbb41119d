"""Where a run comes from: code, command line, environment."""

from __future__ import annotations

import getpass
import logging
import os
import shlex
import subprocess
import sys
import tempfile

from qtorch.tracking.locations import redacted

log = logging.getLogger(__name__)

PREFIX = "QTORCH_"
SWITCH = "QTORCH_RECORD_DIFF"  # "0" leaves the uncommitted changes out
MAX_TEXT = 1_000_000
GIT_SECONDS = 10.0


def command_line() -> str:
    """The command that runs, as a shell would take it."""
    return redacted(shlex.join(sys.argv))


def environment() -> dict[str, str]:
    """The QTORCH_* variables, passwords in URLs left out."""
    return {k: redacted(v) for k, v in sorted(os.environ.items()) if k.startswith(PREFIX)}


def source_tags() -> dict[str, str]:
    """MLflow's own tags of user and source, the commit where there is one."""
    tags = {"mlflow.source.name": sys.argv[0] or "python", "mlflow.source.type": "LOCAL"}
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (KeyError, OSError) as error:
        log.debug("no user name: %s", error)
    commit = git_output(["git", "rev-parse", "HEAD"])
    if commit:
        tags["mlflow.source.git.commit"] = commit.strip()
    return tags


def uncommitted_changes() -> dict[str, str]:
    """`{file name: text}` of what git shows as changed in the working folder, at most 1 MB each."""
    if os.environ.get(SWITCH, "1") == "0":
        return {}
    texts = {
        "code_diff.txt": git_output(["git", "diff", "HEAD"]),
        "code_status.txt": git_output(["git", "status", "--short"]),
    }
    return {name: text for name, text in texts.items() if text}


def git_output(command: list[str]) -> str | None:
    """What git says; None where there is no git, no repository or no answer in time."""
    with tempfile.TemporaryFile() as held:
        try:
            done = subprocess.run(
                command,
                stdout=held,
                stderr=subprocess.DEVNULL,
                stdin=subprocess.DEVNULL,
                timeout=GIT_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            log.debug("%s: %s", shlex.join(command), error)
            return None
        if done.returncode:
            return None
        size = held.seek(0, os.SEEK_END)
        held.seek(0)
        text = held.read(MAX_TEXT).decode(errors="replace")
    if size > MAX_TEXT:
        text += f"\n... cut: {size} bytes in all\n"
    return text
