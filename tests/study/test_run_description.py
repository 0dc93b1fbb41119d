"""Runs made in Python say what they are of."""

from __future__ import annotations

import re

from qtorch import R
from qtorch.data import DatasetH, FrameSource, SyntheticSource
from qtorch.data.handler.handler import DataHandlerLP
from qtorch.model import LightningModel
from qtorch.tracking import Recorder

SEGMENTS = {"train": ("2019-01-01", "2019-09-30"), "valid": ("2019-10-01", "2019-11-30")}


def read_datasets(recorder: Recorder) -> list[tuple[str, str, str]]:
    """Return name, digest and context of the run's datasets, read with MLflow's own client."""
    inputs = recorder.client.get_run(recorder.id).inputs.dataset_inputs
    return [(i.dataset.name, i.dataset.digest, i.tags[0].value) for i in inputs]


def test_run_of_a_script_has_params_a_name_and_its_dataset(store):
    panel = SyntheticSource(6, "2019-01-01", "2019-12-31").load(instruments="stocks")
    loader = {
        "_target_": "qtorch.data.QlibDataLoader",
        "config": {"feature": ["$close/$open"], "label": ["Ref($close,-2)/Ref($close,-1)-1"]},
    }
    source = FrameSource(panel.to_frame())
    handler = DataHandlerLP("all", data_loader=loader, source=source)
    dataset = DatasetH(handler, SEGMENTS)
    model = LightningModel("MLP", trainer={"max_epochs": 1, "accelerator": "cpu"}, seed=3)
    with R.start(experiment_name="script"):
        model.fit(dataset)
        recorder = R.get_recorder()
        model.finetune(dataset, max_epochs=1)
    params = recorder.list_params()
    assert params["model.network"] == "MLP"
    assert params["model.trainer.max_epochs"] == "1"
    assert params["dataset.segments.train"] == "['2019-01-01', '2019-09-30']"
    assert params["dataset.handler.source._target_"] == "qtorch.data.FrameSource"
    assert params["dataset.handler.source.frame"] == "<DataFrame>"
    assert recorder.name == recorder.client.get_run(recorder.id).info.run_name == "MLP"
    segments = "train 2019-01-01..2019-09-30, valid 2019-10-01..2019-11-30"
    assert read_datasets(recorder) == [("FrameSource all", dataset.fingerprint()[:36], segments)]
    page = recorder._repr_html_()
    assert "Recorder MLP" in page
    assert f"runs/{recorder.id}/model-metrics" in page
    assert re.search(r"while <code>mlflow server --backend-store-uri sqlite.* --workers 1<", page)
    with R.start(experiment_name="script", recorder_name="my name"):
        model.fit(dataset)
        assert R.get_recorder().name == "my name"
    with R.start(experiment_name="script"):
        model.finetune(dataset, max_epochs=1)
        assert R.get_recorder().name == "MLP"
        assert R.get_recorder().list_params()["model.network"] == "MLP"
