"""Tests of the README and of docs/: every command and Python block runs, names and links exist."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from page_blocks import PageRunner, page_blocks

from qtorch.trainer import preload

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
CLUSTER_NEEDS = {"slurm", "ray", "torchrun"}
LANGUAGES = {"bash", "python", "yaml", "text"}

# The workflow file of the README's command, in Qlib's format.
WORKFLOW = """\
qlib_init: {provider_uri: bars, region: us}
task:
  model:
    class: GRU
    module_path: qlib.contrib.model.pytorch_gru
    kwargs: {d_feat: 6, hidden_size: 8, num_layers: 1, n_epochs: 200}
  dataset:
    class: DatasetH
    module_path: qlib.data.dataset
    kwargs:
      handler:
        class: Alpha360
        module_path: qlib.contrib.data.handler
        kwargs: {instruments: stocks, fit_start_time: 2018-07-02, fit_end_time: 2019-06-28}
      segments:
        train: [2018-07-02, 2019-06-28]
        valid: [2019-07-01, 2019-12-31]
        test: [2020-01-02, 2020-06-30]
  record: {class: SignalRecord, module_path: qlib.workflow.record_temp}
"""

parametrize_pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def load_slurm_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "slurm_check", ROOT / "scripts" / "slurm" / "check.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def imports() -> None:
    """Import once what the forked commands would import one after another."""
    for name in (*preload.MODULES, "qtorch.cli.train", "qtorch.study.sweep"):
        importlib.import_module(name)


@pytest.mark.slow
@parametrize_pages
def test_page_runs(page, folder, start, no_pictures, imports, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    (folder / "workflow.yaml").write_text(WORKFLOW)
    with PageRunner(folder, start) as runner:
        for block in page_blocks(page):
            if block.needs is None:
                runner.run_block(block)


@parametrize_pages
def test_blocks_declare_their_language(page):
    text = page.read_text()
    blocks = page_blocks(page)
    assert {block.language for block in blocks} <= LANGUAGES
    assert text.count("```") == 2 * len(blocks)
    assert {b.needs for b in blocks} <= {None, "install", *CLUSTER_NEEDS}
    assert text.count("needs: ") == sum(b.needs is not None for b in blocks)


@parametrize_pages
def test_slurm_check_runs_the_blocks_that_need_a_cluster(page, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "slurm"))
    checked_blocks = load_slurm_check().page_blocks()
    sys.modules.pop("cluster", None)
    for block in page_blocks(page):
        assert block.needs not in CLUSTER_NEEDS or block.text in checked_blocks, block.text


@parametrize_pages
def test_install_commands_name_existing_things(page):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    for block in page_blocks(page):
        if block.needs == "install":
            for path in re.findall(r"[\w/.-]+\.(?:sh|txt|py)\b", block.text):
                assert (ROOT / path).exists(), path
            for names in re.findall(r"\[([\w,]+)\]", block.text):
                assert set(names.split(",")) <= extras, names


@parametrize_pages
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, target


@parametrize_pages
def test_named_paths_exist(page):
    names = re.findall(r"`((?:qtorch|conf|docs|scripts|tests)/[\w./*-]*)`", page.read_text())
    for name in names:
        assert list(ROOT.glob(name.rstrip("/"))), name


@parametrize_pages
def test_named_objects_exist(page):
    for name in re.findall(r"`(qtorch(?:\.\w+)+)", page.read_text()):
        parts = name.split(".")
        value: object = importlib.import_module("qtorch")
        for number, part in enumerate(parts[1:], 2):
            if not hasattr(value, part):
                importlib.import_module(".".join(parts[:number]))
            value = getattr(value, part)


@parametrize_pages
def test_commands_mean_the_same_in_every_shell(page):
    """zsh refuses an unquoted [...] that matches no file, and every shell expands {a,b}."""
    for block in page_blocks(page):
        for command in block.commands() if block.language == "bash" else ():
            words = re.sub(r"'[^']*'|\"[^\"]*\"|(^|\s)#.*", "", command)
            assert not re.search(r"[][{}*?()]", words), command


def test_index_lists_every_page():
    index = (DOCS / "index.md").read_text()
    missing = [page.name for page in DOCS.glob("*.md") if f"]({page.name})" not in index]
    assert missing == ["index.md"]


@parametrize_pages
def test_environment_variables_exist(page):
    code = "".join(path.read_text() for path in (ROOT / "qtorch").rglob("*.py"))
    for name in set(re.findall(r"QTORCH_[A-Z_]+", page.read_text())):
        scripts = "".join(path.read_text() for path in (ROOT / "scripts").rglob("*.sh"))
        assert name in code or name in scripts or name in (ROOT / "tests/conftest.py").read_text()
