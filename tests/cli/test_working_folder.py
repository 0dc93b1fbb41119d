"""The console command finds modules of the working folder, as `python -m` does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What pip installs as `qtorch`: a script in a folder of its own, which Python puts on sys.path.
SCRIPT = "import sys\nfrom qtorch.cli.main import COMMANDS, main\n{}sys.exit(main())\n"
PROBE = "COMMANDS['probe'] = ('mine', 'prints the path')\n"
MODULE = """
import os
import sys
from pathlib import Path

from torch import nn


def main(argv):
    print(sys.path[0])
    return 0


class Net(nn.Module):
    def __init__(self, d_feat: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d_feat, 1)

    def forward(self, x):
        Path(f"rank{os.environ.get('RANK')}").touch()
        return self.linear(x[:, -1])[:, 0]
"""


@pytest.fixture
def run(tmp_path):
    """Return `run(words, code)`: run the console command in a folder that has a module `mine`."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "mine.py").write_text(MODULE)
    script = tmp_path / "bin" / "qtorch"
    script.parent.mkdir()

    def run_command(*words, code="", **environment) -> subprocess.CompletedProcess[str]:
        script.write_text(SCRIPT.format(code))
        variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        return subprocess.run(
            [sys.executable, str(script), *words],
            cwd=folder,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    return run_command


@pytest.mark.slow
def test_the_working_folder_is_first_on_the_path(run, tmp_path):
    process = run("probe", code=PROBE)
    assert process.stdout.strip() == str(tmp_path / "work"), process.stderr


def test_a_safe_path_leaves_the_working_folder_out(run):
    process = run("probe", code=PROBE, PYTHONSAFEPATH="1")
    assert process.returncode == 1
    assert "No module named 'mine'" in process.stderr


def test_main_called_from_python_leaves_the_path_alone(monkeypatch, tmp_path):
    from qtorch.cli.main import main

    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert main(["--version"]) == 0
    assert sys.path == path


def test_a_command_writes_where_it_began(monkeypatch, tmp_path):
    """Also with Hydra's setting that jobs work in folders of their own."""
    from qtorch.cli.main import main

    monkeypatch.chdir(tmp_path)
    assert main(["data", "import", "data=synthetic_tiny", "out=bars", "hydra.job.chdir=true"]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["bars"]


def test_python_m_runs_the_command(tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", "qtorch", "--version"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.stdout.startswith("qtorch "), process.stderr


@pytest.mark.slow
def test_jobs_and_ranks_find_modules_of_the_working_folder(run, tmp_path):
    """A job of a sweep runs in a child of the fork server, and each rank is a process too."""
    words = ("debug=tiny", "record=none", "trainer=ddp", "trainer.devices=2")
    network = ("model=lightning", "+model.network._target_=mine.Net")
    process = run("train", "-m", "seed=0", *words, *network, QTORCH_TRUSTED="mine")
    assert process.returncode == 0, process.stderr[-4000:]
    assert {path.name for path in (tmp_path / "work").glob("rank*")} >= {"rank0", "rank1"}
