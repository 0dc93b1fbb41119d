"""The command line as a user starts it, on a market small enough for tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

TINY = ("debug=tiny", "log_level=WARNING")
SMALL = ("model.network.hidden_size=8", "model.network.num_layers=1")


@dataclass
class Told:
    """What a command said."""

    code: int
    out: str
    err: str

    def error(self) -> str:
        """Its one line of error; fails where there is none, several, or a traceback."""
        assert self.code not in (0, None), self.out
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        return lines[0]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A foreign working folder: everything a command leaves behind is in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def qtorch_cli(folder, capsys):
    """`qtorch_cli("train", ...)` in this process."""
    from qtorch.cli.main import main

    def run(*argv: str) -> Told:
        capsys.readouterr()
        code = main(argv)
        told = capsys.readouterr()
        return Told(code, told.out, told.err)

    return run


@pytest.fixture
def train(qtorch_cli):
    """`train(...)`: one epoch on the tiny market, a small LSTM unless the overrides name one."""

    def run(*overrides: str) -> Told:
        own = any(o.startswith("model") for o in overrides)
        return qtorch_cli("train", *TINY, *(() if own else SMALL), *overrides)

    return run


@pytest.fixture
def start(folder):
    """`start("train", ...)` as a process of its own; ended with the test."""
    from forked_command import ForkedCommand

    children = []

    def begin(*argv: str, own_group: bool = False, **env: str) -> ForkedCommand:
        children.append(ForkedCommand(argv, folder, env, own_group))
        return children[-1]

    yield begin
    for child in children:
        child.kill()
        child.communicate()


@pytest.fixture
def runs():
    """`runs(experiment)`: its recorders, by status."""
    from qtorch import R
    from qtorch.core.errors import TrackingError

    def found(experiment: str = "debug"):
        try:
            return list(R.list_recorders(experiment_name=experiment).values())
        except TrackingError:
            return []

    return found
