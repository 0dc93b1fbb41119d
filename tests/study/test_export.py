"""Tests of exports: the file gives the model's scores, or no file is written."""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch

from qtorch import init_instance_by_config
from qtorch.core.errors import ConfigError, DataError, ExportError, NotFittedError
from qtorch.data import Concepts
from qtorch.model.lightning_model import LightningModel
from qtorch.study import export, export_model, load_network

pytestmark = pytest.mark.filterwarnings("ignore")

RNN = {"hidden_size": 6, "num_layers": 2}
NETWORKS = {
    "MLP": {"layers": [4]},
    "GRU": RNN,
    "Transformer": {"d_model": 8, "nhead": 2, "num_layers": 1, "dim_feedforward": 16},
    "GATs": {"base_model": "GRU", **RNN},
    "HIST": {"base_model": "LSTM", **RNN},
}
DAYS = {"order": "day", "days_per_batch": 8}


@pytest.fixture
def fit_model(make_task):
    """`fit_model(name)`: a model with that network after one epoch, and its dataset."""

    def make(name: str, **model):
        task = make_task(network={"_target_": f"qtorch.nn.{name}", **NETWORKS[name]})
        task["dataset"].update(_target_="qtorch.data.TSDatasetH", step_len=4)
        if name in ("GATs", "HIST"):
            task["model"]["batch"] = DAYS
        dataset = init_instance_by_config(task["dataset"])
        if name == "HIST":
            names = [str(i) for i in dataset.samples("test").instruments]
            rows = {"instrument": names, "concept": ["ab"[k % 2] for k in range(len(names))]}
            task["dataset"]["extras"] = {"concept": Concepts(pd.DataFrame(rows))}
            dataset = init_instance_by_config(task["dataset"])
        fitted_model = init_instance_by_config({**task["model"], "seed": 1, **model})
        fitted_model.fit(dataset)
        return fitted_model, dataset

    return make


def first_days(model, dataset, count=2):
    """The samples of the test segment, and the scores of its first days as one array per day."""
    samples = model.input_schema_.match_features(dataset.samples("test"))
    scores = model.predict(dataset)
    days = scores.index.get_level_values("datetime")
    return samples, [scores[days == day].to_numpy() for day in days.unique()[:count]]


@pytest.mark.parametrize("name", ["GRU", "HIST"])
def test_safetensors_export_rebuilds_network(fit_model, tmp_path, name):
    model, dataset = fit_model(name)
    result = export_model(model, dataset, tmp_path / "m.safetensors", run="abc")
    assert result.difference <= result.allowed
    metadata = json.loads((tmp_path / "m.safetensors.json").read_text())
    assert metadata["features"] == ["KMID", "KLEN", "ROC5", "MA5", "STD5"]
    assert (metadata["step_len"], metadata["run"], metadata["format"]) == (4, "abc", "safetensors")
    assert "not in this file" in metadata["note"]
    network = load_network(tmp_path / "m.safetensors")
    assert type(network).__name__ == name
    for key, value in model.network_.state_dict().items():
        assert torch.equal(network.state_dict()[key], value)
    (tmp_path / "other.safetensors").write_bytes(b"not one")
    with pytest.raises(DataError, match="not a network exported by qtorch"):
        load_network(tmp_path / "other.safetensors")


def test_damaged_safetensors_export_is_refused(fit_model, tmp_path):
    path = tmp_path / "m.safetensors"
    model, dataset = fit_model("MLP")
    export_model(model, dataset, path)
    data, rng = path.read_bytes(), random.Random(0)
    assert json.loads((tmp_path / "m.safetensors.json").read_text())["sha256"] == (
        hashlib.sha256(data).hexdigest()
    )
    for position in {*range(60), *range(-60, 0), *rng.choices(range(len(data)), k=300)}:
        damaged = bytearray(data)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=re.escape(str(path))):
            load_network(path)
    tensors = safetensors.torch.load(data)
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    content = json.loads(metadata["qtorch"])
    del content["digest"]  # as older versions wrote it
    safetensors.torch.save_file(tensors, path, metadata={"qtorch": json.dumps(content)})
    assert load_network(path).state_dict().keys() == tensors.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MLP", "GATs"])
def test_torch_program_runs_without_qtorch(fit_model, tmp_path, name):
    model, dataset = fit_model(name)
    path = tmp_path / "m.pt2"
    result = export_model(model, dataset, path)
    assert result.num_bytes == path.stat().st_size
    extra_files = {"qtorch.json": ""}
    program = torch.export.load(io.BytesIO(path.read_bytes()), extra_files=extra_files).module()
    metadata = json.loads(extra_files["qtorch.json"])
    samples, expected_scores = first_days(model, dataset)
    if name == "MLP":
        assert metadata["inputs"] == [{"name": "x", "shape": ["batch", 20], "dtype": "float32"}]
        x = samples.batch(torch.arange(len(expected_scores[0]))).x.transpose(1, 2).flatten(1)
        scores = program(x)
    else:
        assert metadata["inputs"][0]["shape"] == ["days", "instruments", 4, 5]
        batch = samples.day_batch(torch.arange(1))
        scores = program(batch.x, batch.mask)[batch.mask]
    np.testing.assert_allclose(scores.detach().numpy(), expected_scores[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GRU", "MLP", "Transformer", "HIST"])
def test_onnx_scores_equal_model(fit_model, tmp_path, name):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, dataset = fit_model(name)
    path = tmp_path / "m.onnx"
    export_model(model, dataset, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.json"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    metadata = json.loads(session.get_modelmeta().custom_metadata_map["qtorch"])
    assert metadata["features"][0] == "KMID"
    samples, expected_scores = first_days(model, dataset)
    names = [item["name"] for item in metadata["inputs"]]
    assert [item.name for item in session.get_inputs()] == names
    if not model.network_.cross_section:
        count = sum(map(len, expected_scores))
        for rows in (slice(0, 1), slice(0, count)):
            x = samples.batch(torch.arange(count)[rows]).x
            x = x.transpose(1, 2).flatten(1) if name == "MLP" else x
            (onnx_scores,) = session.run(["score"], {"x": x.numpy()})
            np.testing.assert_allclose(
                onnx_scores, np.concatenate(expected_scores)[rows], rtol=1e-5, atol=1e-6
            )
        return
    for day, scores in enumerate(expected_scores):
        batch = samples.day_batch(torch.tensor([day]))
        inputs = {"x": batch.x, "mask": batch.mask, **batch.extra}
        (onnx_scores,) = session.run(["score"], {n: inputs[n].numpy() for n in names})
        np.testing.assert_allclose(onnx_scores[batch.mask], scores, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_several_outputs_are_reduced_to_the_score(fit_model, tmp_path):
    loss = {"_target_": "qtorch.metrics.loss.CrossEntropy", "num_bins": 5}
    model, dataset = fit_model("GRU", loss=loss)
    assert export_model(model, dataset, tmp_path / "m.pt2").samples > 2


def test_file_with_wrong_scores_is_not_written(fit_model, tmp_path, monkeypatch):
    model, dataset = fit_model("GRU")
    real = export._safetensors_bytes

    def change_bias_before_saving(network, metadata):
        with torch.no_grad():
            network.fc_out.bias += 0.01
        return real(network, metadata)

    # This only changes the copy of the network that is written, not the model's own.
    monkeypatch.setattr(export, "_safetensors_bytes", change_bias_before_saving)
    with pytest.raises(ExportError, match=r"differ from the model's by up to 0\.01"):
        export_model(model, dataset, tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []
    result = export_model(model, dataset, tmp_path / "m.safetensors", tolerance=10)
    assert result.difference == pytest.approx(0.01, rel=1e-3)


def test_invalid_exports_raise_clear_errors(fit_model, tmp_path, monkeypatch):
    model, dataset = fit_model("MLP")
    with pytest.raises(ConfigError, match=r"ends in \.onnx, \.pt2, \.safetensors"):
        export_model(model, dataset, tmp_path / "m.bin")
    with pytest.raises(ConfigError, match="Did you mean 'onnx'"):
        export_model(model, dataset, tmp_path / "m.bin", format="onxn")
    with pytest.raises(NotFittedError):
        export_model(LightningModel("MLP"), dataset, tmp_path / "m.onnx")
    with pytest.raises(ConfigError, match="only a LightningModel has a network"):
        export_model(object(), dataset, tmp_path / "m.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "qtorch.study.onnx_file", raising=False)
    with pytest.raises(ConfigError, match=r"needs onnxruntime: pip install 'onnx>="):
        export_model(model, dataset, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SFM", "TabNet", "IGMTF", "MASTER", "StockMixer", "Mamba", "ADD"])
def test_networks_with_loops_or_memory_are_traced_for_any_batch_size(name, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "nn")
    from network_inputs import NETWORKS, build_inputs, build_network

    from qtorch.study.export import ScoringModule, trace_program

    cls = next(c for c in NETWORKS if c.__name__ == name)
    scoring = ScoringModule(build_network(cls).eval(), lambda score: score[..., 0])
    large_inputs, single_inputs = (
        [build_inputs(cls, size=s)[n] for n in scoring.names] for s in (None, 1)
    )
    program = trace_program(scoring, large_inputs)[0].module()
    with torch.inference_mode():
        input_sets = [large_inputs, single_inputs]
        if cls.cross_section:  # the same with days of a single instrument
            input_sets += [
                [inputs[:, :1] for inputs in tensors] for tensors in (large_inputs, single_inputs)
            ]
        for inputs in input_sets:
            torch.testing.assert_close(program(*inputs), scoring(*inputs), rtol=1e-4, atol=1e-6)
