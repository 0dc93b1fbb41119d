"""The settings of Qlib's benchmarks as workflow files: each translates and builds, some are run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from qtorch import init_instance_by_config
from qtorch.cli.main import main
from qtorch.cli.workflow.task import translate_workflow
from qtorch.core.qlib.notes import Notes
from qtorch.data import DatasetH
from qtorch.model import LightningModel
from qtorch.model.network_config import build_network
from qtorch.tracking import R

ROOT = Path(__file__).resolve().parents[2]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "qlib_workflows", ROOT / "scripts" / "qlib_workflows.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


workflows = load_script()
LIBRARIES = {"XGBoost": "xgboost", "CatBoost": "catboost"}
ROW_MODELS = ("Linear", "LightGBM", "DoubleEnsemble", *LIBRARIES)
DEEP = [name for name in workflows.workflow_names() if not name.startswith(ROW_MODELS)]


def has_library(name: str) -> bool:
    """Whether the library of a workflow's model is installed, if it needs one."""
    library = LIBRARIES.get(name.partition("-")[0])
    return library is None or importlib.util.find_spec(library) is not None


def translate(name: str, market: Path) -> dict[str, Any]:
    document = workflows.build_workflow(name, str(market))
    settings = OmegaConf.to_container(OmegaConf.create(document))
    assert isinstance(settings, dict)
    common = {"seed": 0, "as_qlib": False, "sweep": {"stored": False}, "workflow": {"file": None}}
    return translate_workflow({**settings, **common}, settings["task"], Notes())


def test_every_benchmark_translates_and_builds(tmp_path):
    market = workflows.write_market(tmp_path, num_instruments=6)
    assert len(workflows.workflow_names()) >= 60
    assert len({name.partition("-")[0] for name in DEEP}) >= 18
    for name in filter(has_library, workflows.workflow_names()):
        task = translate(name, market)
        model = init_instance_by_config(task["model"])
        assert isinstance(init_instance_by_config(task["dataset"]), DatasetH)
        if not isinstance(model, LightningModel):
            assert name not in DEEP
            continue
        assert model.trainer.get("max_epochs") or model.trainer["max_steps"] == 8000
        config = model.network
        network = build_network(config if isinstance(config, dict) else {"_target_": config})
        assert isinstance(network, torch.nn.Module)
        for record in task["record"]:
            init_instance_by_config(
                record, try_kwargs={"model": None, "dataset": None, "recorder": None}
            )


@pytest.mark.slow
def test_benchmarks_run_end_to_end_and_the_same_job_runs_as_an_experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    market = workflows.write_market(tmp_path, num_instruments=12)
    paths = {p.stem: p for p in workflows.write_workflows(tmp_path, market)}
    monkeypatch.setenv("QTORCH_CACHE", str(tmp_path / "cache"))
    settings = {}
    names = ("GRU-158-csi300", "MLP-158-csi300", "HIST-360-csi300", "Linear-158-csi500",
             "XGBoost-158-csi300", "CatBoost-158-csi300", "DoubleEnsemble-158-csi300")  # fmt: skip
    for name in filter(has_library, names):
        words = [*workflows.short_overrides(name), "sweep.isolate=false"]
        assert main(["run", str(paths[name]), *words]) == 0
        recorder = next(iter(R.list_recorders(experiment_name="benchmarks").values()))
        settings[name] = recorder.list_metrics()
    figures = ("IC", "Rank IC", "1day.excess_return_with_cost.annualized_return")
    assert all(set(figures) <= set(metrics) for metrics in settings.values())

    name = "GRU-158-csi300"
    words = workflows.short_overrides(name)
    assert main(["run", "--translate", str(paths[name]), "out=study", *words]) == 0
    text = (tmp_path / "study" / "experiment" / "GRU_158_csi300.yaml").read_text()
    assert "# - n_jobs (GRU)" in text
    command = ["train", "--config-dir", "study", "experiment=GRU_158_csi300"]
    assert main([*command, "sweep.isolate=false"]) == 0
    runs = R.list_recorders(experiment_name="benchmarks").values()
    same = [r.list_metrics()["IC"] for r in runs if r.list_metrics()["IC"] == settings[name]["IC"]]
    assert len(same) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("session_fork_server")
def test_a_sweep_of_a_workflow_is_resumed_from_its_store(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    market = workflows.write_market(tmp_path, num_instruments=12)
    path = next(p for p in workflows.write_workflows(tmp_path, market) if "Linear" in p.name)
    words = [*workflows.short_overrides(path.stem), "task.model.kwargs.estimator=ridge,lasso"]
    words += ["+task.model.kwargs.alpha=0.1", "sweep.name=estimators"]

    assert main(["run", "-m", str(path), *words]) == 0
    path.unlink()
    capfd.readouterr()
    assert main(["sweep", "resume", "estimators"]) == 0
    assert capfd.readouterr().err.count("already finished") == 2
    assert main(["run", str(path)]) == 1
    assert "there is no workflow file" in capfd.readouterr().err
