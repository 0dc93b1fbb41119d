"""One search path for a wheel and for a working tree."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from qtorch.cli import config_path as module
from qtorch.cli.config_path import config_path

ROOT = Path(__file__).resolve().parents[2]


def test_the_working_tree_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (config_path() / "train.yaml").is_file()


def test_a_package_that_carries_conf_uses_its_own(tmp_path, monkeypatch):
    inside = tmp_path / "qtorch" / "conf"
    (tmp_path / "qtorch" / "cli").mkdir(parents=True)
    inside.mkdir()
    (inside / "train.yaml").touch()
    monkeypatch.setattr(module, "__file__", str(tmp_path / "qtorch" / "cli" / "config_path.py"))
    assert config_path() == inside


def test_a_damaged_installation_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "__file__", str(tmp_path / "qtorch" / "cli" / "config_path.py"))
    with pytest.raises(FileNotFoundError, match="install qtorch again"):
        config_path()


@pytest.mark.slow
def test_the_wheel_carries_every_config_and_works_from_a_foreign_folder(tmp_path):
    pytest.importorskip("hatchling")
    code = (
        "import sys; from hatchling.build import build_wheel; sys.stdout.write("
        f"build_wheel({str(tmp_path)!r}))"
    )
    built = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    wheel = tmp_path / built.stdout.splitlines()[-1]
    with zipfile.ZipFile(wheel) as archive:
        held = {n for n in archive.namelist() if n.startswith("qtorch/conf/")}
        archive.extractall(tmp_path / "site")
    ours = {f"qtorch/conf/{p.relative_to(ROOT / 'conf')}" for p in (ROOT / "conf").rglob("*.yaml")}
    assert held == ours
    command = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); from qtorch.cli.main import "
        "main; sys.exit(main(['train', '--cfg', 'job']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "step_len" in done.stdout
    where = (
        f"{command.split(';')[1]}; import qtorch.cli.config_path as c; print(c.config_path()); "
        "from qtorch.cli.main import main; main(['train', '-m', 'hydra/sweeper=optuna', 'seed=1'])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", f"import sys; {where}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(shown.stdout.strip()) == tmp_path / "site" / "qtorch" / "conf"
    assert "the search has no space" in shown.stderr  # our plugins are Hydra's there too
