"""Provenance of a run: code version, command line and environment."""

from __future__ import annotations

import getpass
import logging
import os
import shlex
import subprocess
import sys
import tempfile

from qtorch.core.secrets import MASK, URLS_VARIABLE, is_secret_name, redact_secrets, redact_urls
from qtorch.core.session import CHILD_VARIABLES

log = logging.getLogger(__name__)

PREFIX = "QTORCH_"
# "0" switches the recording off: of uncommitted changes, and of QTORCH_* variables.
DIFF_SWITCH, ENVIRONMENT_SWITCH = "QTORCH_RECORD_DIFF", "QTORCH_RECORD_ENVIRONMENT"
MAX_TEXT = 1_000_000
GIT_SECONDS = 10.0


def command_line() -> str:
    """Return the command line of this process, quoted for a shell, without secrets."""
    # In the quoted text a quotation mark could end a password too early.
    return redact_secrets(shlex.join(map(redact_urls, sys.argv)))


def qtorch_environment() -> dict[str, str]:
    """Return the QTORCH_* environment variables that the user has set, without secrets."""
    if os.environ.get(ENVIRONMENT_SWITCH) == "0":
        return {}
    return {
        name: MASK if is_secret_name(name) else redact_secrets(value)
        for name, value in sorted(os.environ.items())
        if name.startswith(PREFIX) and name not in (URLS_VARIABLE, *CHILD_VARIABLES)
    }


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
    """Return git's diff and status here as `{file name: text}`, without secrets, up to 1 MB each.

    QTORCH_RECORD_DIFF=0 switches it off.
    """
    if os.environ.get(DIFF_SWITCH) == "0":
        return {}
    texts = {
        "code_diff.txt": git_output(["git", "diff", "HEAD"]),
        "code_status.txt": git_output(["git", "status", "--short"]),
    }
    return {name: redact_secrets(text) for name, text in texts.items() if text}


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
