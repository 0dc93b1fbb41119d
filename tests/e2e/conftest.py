"""Fixtures that run the command line as a user does, on a market small enough for tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

TINY = ("debug=tiny", "log_level=WARNING")
SMALL = ("model.network.hidden_size=8", "model.network.num_layers=1")


@dataclass
class CommandResult:
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str

    def error(self) -> str:
        """Return the single error line; fail if there is none, several, or a traceback."""
        assert self.code not in (0, None), self.out
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        return lines[0]


@pytest.fixture(autouse=True)
def empty_ic_chart(monkeypatch) -> None:
    """Let runs store an empty picture; tests/record draws the IC chart."""
    from matplotlib.figure import Figure

    from qtorch.record import signal

    monkeypatch.setattr(signal, "ic_chart", lambda *_: Figure((1, 1)))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Change to an empty working folder, which collects everything that the commands write."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def qtorch_cli(folder, capsys):
    """Return `qtorch_cli("train", ...)`, which runs a command in this process."""
    from qtorch.cli.main import main

    def run(*argv: str) -> CommandResult:
        capsys.readouterr()
        code = main(argv)
        output = capsys.readouterr()
        return CommandResult(code, output.out, output.err)

    return run


@pytest.fixture
def train(qtorch_cli):
    """Return `train(...)`: one epoch on the tiny market, by default with a small LSTM."""

    def run(*overrides: str) -> CommandResult:
        has_model = any(o.startswith("model") for o in overrides)
        return qtorch_cli("train", *TINY, *(() if has_model else SMALL), *overrides)

    return run


@pytest.fixture
def start(folder):
    """Return `start("train", ...)`: start a command in a process that is killed after the test."""
    from forked_command import ForkedCommand

    children = []

    def start_command(*argv: str, new_session: bool = False, **env: str) -> ForkedCommand:
        children.append(ForkedCommand(argv, folder, env, new_session))
        return children[-1]

    yield start_command
    for child in children:
        child.kill()
        child.communicate()


@pytest.fixture
def runs():
    """Return `runs(experiment)`, which lists the recorders of an experiment."""
    from qtorch import R
    from qtorch.core.errors import TrackingError

    def list_runs(experiment: str = "debug"):
        try:
            return list(R.list_recorders(experiment_name=experiment).values())
        except TrackingError:
            return []

    return list_runs
