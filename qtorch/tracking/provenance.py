"""Provenance of a run: code version, command line and environment."""

from __future__ import annotations

import getpass
import logging
import os
import shlex
import subprocess
import sys
import tempfile

from qtorch.tracking.locations import redact_password

log = logging.getLogger(__name__)

PREFIX = "QTORCH_"
SWITCH = "QTORCH_RECORD_DIFF"  # "0" switches the recording of uncommitted changes off
MAX_TEXT = 1_000_000
GIT_SECONDS = 10.0


def command_line() -> str:
    """Return the command line of this process, quoted for a shell, without passwords in URLs."""
    return redact_password(shlex.join(sys.argv))


def qtorch_environment() -> dict[str, str]:
    """Return the QTORCH_* environment variables, without passwords in URLs."""
    return {k: redact_password(v) for k, v in sorted(os.environ.items()) if k.startswith(PREFIX)}


def source_tags() -> dict[str, str]:
    """Return MLflow's own tags for user and source, with the git commit if there is one."""
    tags = {"mlflow.source.name": sys.argv[0] or "python", "mlflow.source.type": "LOCAL"}
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (KeyError, OSError) as error:
        log.debug("no user name: %s", error)
    commit = git_output(["git", "rev-parse", "HEAD"])
    if commit:
        tags["mlflow.source.git.commit"] = commit.strip()
    return tags


def git_changes() -> dict[str, str]:
    """Return git's diff and status here as `{file name: text}`, each cut to 1 MB."""
    if os.environ.get(SWITCH, "1") == "0":
        return {}
    texts = {
        "code_diff.txt": git_output(["git", "diff", "HEAD"]),
        "code_status.txt": git_output(["git", "status", "--short"]),
    }
    return {name: text for name, text in texts.items() if text}


def git_output(command: list[str]) -> str | None:
    """Return git's output; None without git or a repository, or if git takes too long."""
    with tempfile.TemporaryFile() as output:
        try:
            result = subprocess.run(
                command,
                stdout=output,
                stderr=subprocess.DEVNULL,
                stdin=subprocess.DEVNULL,
                timeout=GIT_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            log.debug("%s: %s", shlex.join(command), error)
            return None
        if result.returncode:
            return None
        size = output.seek(0, os.SEEK_END)
        output.seek(0)
        text = output.read(MAX_TEXT).decode(errors="replace")
    if size > MAX_TEXT:
        text += f"\n... truncated: {size} bytes in total\n"
    return text
