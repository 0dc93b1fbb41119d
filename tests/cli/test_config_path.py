"""Tests that the configuration is found in a wheel and in a working tree."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from qtorch.cli import compose as module
from qtorch.cli.compose import config_path

ROOT = Path(__file__).resolve().parents[2]


def test_working_tree_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (config_path() / "train.yaml").is_file()


def test_package_with_configs_uses_them(tmp_path, monkeypatch):
    inside = tmp_path / "qtorch" / "conf"
    (tmp_path / "qtorch" / "cli").mkdir(parents=True)
    inside.mkdir()
    (inside / "train.yaml").touch()
    monkeypatch.setattr(module, "__file__", str(tmp_path / "qtorch" / "cli" / "config_path.py"))
    assert config_path() == inside


def test_missing_configs_raise_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "__file__", str(tmp_path / "qtorch" / "cli" / "config_path.py"))
    with pytest.raises(FileNotFoundError, match="reinstall qtorch"):
        config_path()


@pytest.mark.slow
def test_wheel_contains_all_configs_and_templates_and_works_from_another_folder(tmp_path):
    pytest.importorskip("hatchling")
    code = (
        "import sys; from hatchling.build import build_wheel; sys.stdout.write("
        f"build_wheel({str(tmp_path)!r}))"
    )
    build = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    wheel = tmp_path / build.stdout.splitlines()[-1]
    with zipfile.ZipFile(wheel) as archive:
        wheel_configs = {n for n in archive.namelist() if n.startswith("qtorch/conf/")}
        wheel_templates = {n for n in archive.namelist() if "/templates/" in n}
        archive.extractall(tmp_path / "site")
    configs = {
        f"qtorch/conf/{p.relative_to(ROOT / 'conf')}" for p in (ROOT / "conf").rglob("*.yaml")
    }
    assert wheel_configs == configs
    templates = (ROOT / "qtorch" / "record" / "report" / "templates").iterdir()
    assert wheel_templates == {p.relative_to(ROOT).as_posix() for p in templates}
    command = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); from qtorch.cli.main import "
        "main; sys.exit(main(['train', '--cfg', 'job']))"
    )
    process = subprocess.run(
        [sys.executable, "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert "step_len" in process.stdout
    path_code = (
        f"{command.split(';')[1]}; import qtorch.cli.compose as c; print(c.config_path()); "
        "from qtorch.cli.main import main; main(['train', '-m', 'hydra/sweeper=optuna', 'seed=1'])"
    )
    path_process = subprocess.run(
        [sys.executable, "-c", f"import sys; {path_code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(path_process.stdout.strip()) == tmp_path / "site" / "qtorch" / "conf"
    assert "the search has no space" in path_process.stderr  # the plugins are registered there too
