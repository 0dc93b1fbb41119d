"""Variations of Qlib's public workflow files: each is translated and built, or refused in words."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from qtorch import init_instance_by_config
from qtorch.cli.workflow.task import translate_workflow
from qtorch.core.errors import ConfigError, QtorchError
from qtorch.core.qlib.notes import Notes
from qtorch.data import DatasetH
from qtorch.trainer.checks import check_task

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "workflows"))

import variants  # noqa: E402
from qlib_workflows import write_market  # noqa: E402

REFUSED = {
    "multi_frequency": r"cannot load a module from 'multi_freq_handler.py': no such file",
    "high_frequency_tree": r"task\.model: .*HFLGBModel is not available: .* the nearest is",
    "executor_of_minutes": r"executor: .*NestedExecutor is not available: .* the nearest is",
    "hist_without_files": r"task\.model\.kwargs\.model_path: .*there is no file .*csi300.pkl",
    "gats_with_weights": r"task\.model\.kwargs\.model_path: .*there is no file .*_lstm_ts.pkl",
    "temporal_fusion_transformer": r"task\.model: tft\.TFTModel is not available: .*TensorFlow",
}


@pytest.fixture(scope="module")
def market(tmp_path_factory) -> Path:
    return write_market(tmp_path_factory.mktemp("market"), num_instruments=12)


def translate(workflow: dict[str, Any], notes: Notes) -> dict[str, Any]:
    common = {"seed": 0, "as_qlib": False, "sweep": {"stored": False}, "workflow": {"file": None}}
    return translate_workflow({**workflow, **common}, workflow["task"], notes)


def build(name: str, market: Path) -> dict[str, Any]:
    """Translate a variant as a job does, check it and build its parts."""
    base, change = variants.VARIANTS[name]
    workflow = variants.short_workflow(base, str(market))
    change(workflow)
    task = translate(workflow, Notes())
    check_task(task)
    assert isinstance(init_instance_by_config(task["dataset"]), DatasetH)
    objects = {"model": None, "dataset": None, "recorder": None}
    for record in task["record"]:
        assert record["_target_"].startswith("qtorch.record.")
        init_instance_by_config(record, try_kwargs=objects)
        strategy = record.get("config", {}).get("strategy")
        if strategy:
            init_instance_by_config(strategy)
    return task


@pytest.mark.parametrize("name", sorted(set(variants.VARIANTS) - set(REFUSED)))
def test_a_variant_translates_and_builds(name, market, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build(name, market)


@pytest.mark.parametrize(("name", "message"), REFUSED.items())
def test_a_variant_is_refused_in_one_line(name, message, market, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QtorchError, match=message) as error:
        build(name, market)
    assert "\n" not in str(error.value)


def test_weights_are_those_of_a_file_and_unknown_arguments_refused(market, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "benchmarks" / "LSTM" / "csi300_lstm_ts.pkl"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    task = build("gats_with_weights", market)
    assert task["model"]["init_from"] == f"file:{file}"
    workflow = variants.short_workflow("GATs-158-csi300", str(market))
    workflow["task"]["model"]["kwargs"]["with_pretrained"] = True
    with pytest.raises(ConfigError, match="Did you mean 'with_pretrain'"):
        translate(workflow, Notes())
