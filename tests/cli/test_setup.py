"""A new project runs as it is, and the shell completes commands and settings."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from qtorch import R
from qtorch.cli.main import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_new_project_trains_its_network(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["new", "study/"]) == 0
    command = "qtorch train --config-dir conf experiment=study"
    assert command in capsys.readouterr().out
    assert command in (tmp_path / "study" / "README.md").read_text()
    monkeypatch.chdir(tmp_path / "study")
    monkeypatch.syspath_prepend(str(tmp_path / "study"))
    runpy.run_path("test_mean_network.py")["test_scores_and_gradients"]()
    assert main([*command.split()[1:], "trainer.max_epochs=1", "log_level=WARNING"]) == 0
    (run,) = R.list_recorders(experiment_name="study").values()
    assert run.list_params()["model.network._target_"] == "mean_network.MeanNetwork"
    monkeypatch.setenv("QTORCH_TRUSTED", "mean_network")
    assert main(["predict", "run=latest", "segment=test", "out=scores.parquet"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs the folder"),
        (["a", "b"], "needs the folder"),
        (["1 study"], "use letters"),
        (["full"], "is not empty"),
    ],
)
def test_new_project_that_cannot_be_written(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.py").touch()
    assert main(["new", *words]) in (1, 2)
    output = capsys.readouterr()
    assert message in output.err or "usage: qtorch new" in output.out
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def complete_line(line: str) -> list[str]:
    """Return what bash offers at the end of a line."""
    script = f"""
qtorch() {{ "{sys.executable}" -m qtorch "$@"; }}
COMP_WORDBREAKS=' ='
eval "$(qtorch completion bash)"
COMP_LINE="{line}"; COMP_POINT=${{#COMP_LINE}}
COMP_WORDS=($COMP_LINE); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
_qtorch
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    process = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return process.stdout.split("\n")[:-1]


@pytest.mark.slow
def test_bash_completes_commands_and_settings():
    assert complete_line("qtorch tra") == ["train ", "tracking "]
    assert complete_line("qtorch train debug=tiny model=ga") == ["model=gats"]
    assert complete_line("qtorch train trainer.max_e") == ["trainer.max_epochs="]


def test_completion_names_all_commands(capsys):
    assert main(["completion", "zsh"]) == 0
    output = capsys.readouterr().out
    assert " ".join(COMMANDS) in output
    assert "bashcompinit" in output
    assert main(["completion", "fish"]) == 1
    assert "bash, zsh" in capsys.readouterr().err
