"""Exports: the file gives the model's own scores, or there is no file."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
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
def fitted(make_task):
    """`fitted(name)`: a model of that network after one epoch, and its dataset."""

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
        built = init_instance_by_config({**task["model"], "seed": 1, **model})
        built.fit(dataset)
        return built, dataset

    return make


def first_days(model, dataset, count=2):
    """The scores of a segment's first days, one Series a day, and the samples."""
    samples = model.learnt_.matched(dataset.samples("test"))
    scores = model.predict(dataset)
    days = scores.index.get_level_values("datetime")
    return samples, [scores[days == day].to_numpy() for day in days.unique()[:count]]


@pytest.mark.parametrize("name", ["GRU", "HIST"])
def test_weights_and_json_build_the_network_again(fitted, tmp_path, name):
    model, dataset = fitted(name)
    done = export_model(model, dataset, tmp_path / "m.safetensors", run="abc")
    assert done.difference <= done.allowed
    told = json.loads((tmp_path / "m.safetensors.json").read_text())
    assert told["features"] == ["KMID", "KLEN", "ROC5", "MA5", "STD5"]
    assert (told["step_len"], told["run"], told["format"]) == (4, "abc", "safetensors")
    assert "not in this file" in told["note"]
    network = load_network(tmp_path / "m.safetensors")
    assert type(network).__name__ == name
    for key, value in model.network_.state_dict().items():
        assert torch.equal(network.state_dict()[key], value)
    (tmp_path / "other.safetensors").write_bytes(b"not one")
    with pytest.raises(DataError, match="no network that qtorch exported"):
        load_network(tmp_path / "other.safetensors")


@pytest.mark.parametrize("name", ["MLP", pytest.param("GATs", marks=pytest.mark.slow)])
def test_a_torch_program_runs_without_qtorch(fitted, tmp_path, name):
    model, dataset = fitted(name)
    path = tmp_path / "m.pt2"
    done = export_model(model, dataset, path)
    assert done.num_bytes == path.stat().st_size
    more = {"qtorch.json": ""}
    program = torch.export.load(io.BytesIO(path.read_bytes()), extra_files=more).module()
    told = json.loads(more["qtorch.json"])
    samples, expected = first_days(model, dataset)
    if name == "MLP":
        assert told["inputs"] == [{"name": "x", "shape": ["batch", 20], "dtype": "float32"}]
        x = samples.batch(torch.arange(len(expected[0]))).x.transpose(1, 2).flatten(1)
        found = program(x)
    else:
        assert told["inputs"][0]["shape"] == ["days", "instruments", 4, 5]
        batch = samples.day_batch(torch.arange(1))
        found = program(batch.x, batch.mask)[batch.mask]
    np.testing.assert_allclose(found.detach().numpy(), expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    ["GRU", *(pytest.param(n, marks=pytest.mark.slow) for n in ("MLP", "Transformer", "HIST"))],
)
def test_onnxruntime_gives_the_scores(fitted, tmp_path, name):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, dataset = fitted(name)
    path = tmp_path / "m.onnx"
    export_model(model, dataset, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.json"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    told = json.loads(session.get_modelmeta().custom_metadata_map["qtorch"])
    assert told["features"][0] == "KMID"
    samples, expected = first_days(model, dataset)
    names = [each["name"] for each in told["inputs"]]
    assert [each.name for each in session.get_inputs()] == names
    if not model.network_.cross_section:
        count = sum(map(len, expected))
        for rows in (slice(0, 1), slice(0, count)):
            x = samples.batch(torch.arange(count)[rows]).x
            x = x.transpose(1, 2).flatten(1) if name == "MLP" else x
            (found,) = session.run(["score"], {"x": x.numpy()})
            np.testing.assert_allclose(found, np.concatenate(expected)[rows], rtol=1e-5, atol=1e-6)
        return
    for day, scores in enumerate(expected):
        batch = samples.day_batch(torch.tensor([day]))
        given = {"x": batch.x, "mask": batch.mask, **batch.extra}
        (found,) = session.run(["score"], {n: given[n].numpy() for n in names})
        np.testing.assert_allclose(found[batch.mask], scores, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_several_outputs_become_the_score_that_is_predicted(fitted, tmp_path):
    loss = {"_target_": "qtorch.metrics.loss.CrossEntropy", "num_bins": 5}
    model, dataset = fitted("GRU", loss=loss)
    assert export_model(model, dataset, tmp_path / "m.pt2").samples > 2


def test_a_file_that_differs_is_not_left_behind(fitted, tmp_path, monkeypatch):
    model, dataset = fitted("GRU")
    real = export._safetensors_bytes

    def off(network, told):
        with torch.no_grad():
            network.fc_out.bias += 0.01
        return real(network, told)

    # The scoring network is the one that is written: the model's own stays as it is.
    monkeypatch.setattr(export, "_safetensors_bytes", off)
    with pytest.raises(ExportError, match=r"differ from the model's by up to 0\.01"):
        export_model(model, dataset, tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []
    done = export_model(model, dataset, tmp_path / "m.safetensors", tolerance=10)
    assert done.difference == pytest.approx(0.01, rel=1e-3)


def test_what_cannot_be_exported_says_why(fitted, tmp_path, monkeypatch):
    model, dataset = fitted("MLP")
    with pytest.raises(ConfigError, match=r"ends in \.onnx, \.pt2, \.safetensors"):
        export_model(model, dataset, tmp_path / "m.bin")
    with pytest.raises(ConfigError, match="Did you mean 'onnx'"):
        export_model(model, dataset, tmp_path / "m.bin", format="onxn")
    with pytest.raises(NotFittedError):
        export_model(LightningModel("MLP"), dataset, tmp_path / "m.onnx")
    with pytest.raises(ConfigError, match="has no network to export"):
        export_model(object(), dataset, tmp_path / "m.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "qtorch.study.onnx_file", raising=False)
    with pytest.raises(ConfigError, match=r"needs onnxruntime: pip install 'qtorch\[export\]'"):
        export_model(model, dataset, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SFM", "TabNet", "IGMTF", "MASTER", "StockMixer", "Mamba", "ADD"])
def test_loops_and_banks_become_programs_of_any_batch(name, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "nn")
    from network_inputs import NETWORKS, build, feed

    from qtorch.study.export_program import Scoring, traced

    cls = next(c for c in NETWORKS if c.__name__ == name)
    scoring = Scoring(build(cls).eval(), lambda score: score[..., 0])
    several, one = ([feed(cls, size=s)[n] for n in scoring.names] for s in (None, 1))
    program = traced(scoring, several).program.module()
    with torch.inference_mode():
        batches = [several, one]
        if cls.cross_section:  # days of one instrument, several and one
            batches += [[given[:, :1] for given in batch] for batch in (several, one)]
        for given in batches:
            torch.testing.assert_close(program(*given), scoring(*given), rtol=1e-4, atol=1e-6)
