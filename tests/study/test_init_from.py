"""Tests of warm starts between architectures: a network copies the weights that it shares."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from qtorch import R, init_instance_by_config
from qtorch.core.errors import ConfigError, DataError, TrackingError
from qtorch.core.identity import fit_id
from qtorch.model.finetune import copy_shared_weights, load_weights_file
from qtorch.model.lightning_model import LightningModel
from qtorch.nn import ADD, GRU, HIST, LSTM, MLP, GATs
from qtorch.tracking.recorder import DEPTH_TAG, FROM_TAG, PARENT_TAG
from qtorch.trainer import task_train
from qtorch.trainer.checks import check_task

SIZE = {"hidden_size": 6, "num_layers": 1}
LSTM_NETWORK = {"_target_": "qtorch.nn.LSTM", **SIZE}
GATS_NETWORK = {"_target_": "qtorch.nn.GATs", "base_model": "LSTM", "dropout": 0.0, **SIZE}
DAYS = {"order": "day", "days_per_batch": 8}


def network_state(recorder) -> dict[str, torch.Tensor]:
    return recorder.load_object("params.pkl").network_.state_dict()


@pytest.fixture
def make_window_task(make_task):
    """`make_window_task(network, **model)`: a task on windows of four days, without records."""

    def make(network, columns=None, step_len=4, **model):
        task = make_task(network=network, record=[])
        task["model"].update(model)
        task["dataset"].update(_target_="qtorch.data.TSDatasetH", step_len=step_len)
        if columns is not None:
            task["dataset"]["handler"]["columns"] = columns
        return task

    return make


def gats_task(make_window_task, init_source, **options):
    options = {"batch": DAYS, "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.0}, **options}
    return make_window_task(options.pop("network", GATS_NETWORK), init_from=init_source, **options)


@pytest.mark.slow
def test_gats_starts_from_lstm_weights(store, make_window_task):
    earlier = task_train(make_window_task(LSTM_NETWORK), "first")
    artifacts_before = earlier.list_tags(), sorted(earlier.list_artifacts())
    task = gats_task(make_window_task, f"run:{earlier.id}")
    run = task_train(task, "second")

    # With a learning rate of zero, the weights are those that the training started from.
    lstm_state, gats_state = network_state(earlier), network_state(run)
    assert all(torch.equal(gats_state[name], lstm_state[name]) for name in lstm_state)
    assert set(gats_state) - set(lstm_state) == {
        "transformation.weight", "transformation.bias", "a", "fc.weight", "fc.bias"
    }  # fmt: skip
    tags = run.list_tags()
    assert (tags[FROM_TAG], tags[DEPTH_TAG], tags[PARENT_TAG]) == (earlier.id, "1", earlier.id)
    report = run.load_object("fit_report")["init_from"]
    assert report == {"from": f"run:{earlier.id}", "weights": list(lstm_state)}
    assert (earlier.list_tags(), sorted(earlier.list_artifacts())) == artifacts_before

    # The task is plain data: another source run is another training, and the run stores it.
    assert fit_id(task, "") != fit_id(gats_task(make_window_task, "run:another"), "")
    assert run.load_object("task")["model"]["init_from"] == f"run:{earlier.id}"
    model = run.load_object("params.pkl")
    assert model.to_config()["init_from"] == f"run:{earlier.id}"
    dataset = run.load_object("dataset")
    model.finetune(dataset)  # continues from its own weights and does not need the earlier run
    assert "init_from" not in model.fit_report_


@pytest.mark.slow
def test_features_are_matched_by_name_with_longer_windows(store, make_window_task):
    columns = ["KMID", "KLEN", "ROC5", "MA5", "STD5"]
    earlier = task_train(make_window_task(LSTM_NETWORK, columns), "first")
    init = f"run:{earlier.id}"
    runs = [
        task_train(gats_task(make_window_task, init, columns=c, step_len=5), "second")
        for c in (columns, columns[::-1])
    ]
    first, second = (r.load_object("params.pkl") for r in runs)
    assert second.input_schema_.feature_names == tuple(columns)
    dataset = runs[1].load_object("dataset")
    assert torch.equal(
        torch.tensor(first.predict(dataset).to_numpy()),
        torch.tensor(second.predict(dataset).to_numpy()),
    )
    with pytest.raises(DataError, match=r"(?s)missing features: STD5.*additional features: STD10"):
        task_train(gats_task(make_window_task, init, columns=[*columns[:4], "STD10"]), "second")


@pytest.mark.slow
def test_incompatible_init_from_raises(store, make_window_task):
    earlier = task_train(make_window_task(LSTM_NETWORK), "first")
    init = f"run:{earlier.id}"
    wider = {**GATS_NETWORK, "hidden_size": 8}
    shapes = (
        r"GATs and the run's LSTM differ .*rnn.weight_ih_l0 \[32, 5\] and \[24, 5\].*base_model"
    )
    with pytest.raises(ConfigError, match=shapes):
        task_train(gats_task(make_window_task, init, network=wider), "second")
    with pytest.raises(
        ConfigError, match=r"share no weight except the head's.*fc_out.weight \[1, 6\]"
    ):
        mlp = {"_target_": "qtorch.nn.MLP", "layers": [4]}
        task_train(gats_task(make_window_task, init, network=mlp), "second")
    with pytest.raises((ConfigError, TrackingError), match="f" * 32):
        task_train(gats_task(make_window_task, "run:" + "f" * 32), "second")
    with pytest.raises(ConfigError, match="init_model"):
        task_train(gats_task(make_window_task, f"{init}/init_model"), "second")
    with R.start(experiment_name="first"):
        R.save_objects(**{"params.pkl": {"not": "a model"}})
        other_id = R.get_recorder().id
    with pytest.raises(ConfigError, match="has no fitted network"):
        task_train(gats_task(make_window_task, f"run:{other_id}"), "second")
    for wrong in (earlier.id, "run:", f"rum:{earlier.id}"):
        with pytest.raises(ConfigError, match="expected 'run:RUN_ID'"):
            LightningModel(GATS_NETWORK, init_from=wrong)
    with pytest.raises(ConfigError, match="must be plain data"):
        LightningModel(GATS_NETWORK, init_from=LightningModel(LSTM_NETWORK))


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("target", [GATs, HIST])
def test_graph_networks_copy_lstm_and_gru_weights(kind, target):
    torch.manual_seed(0)
    earlier = {"LSTM": LSTM, "GRU": GRU}[kind](d_feat=3, hidden_size=4, num_outputs=2)
    network = target(d_feat=3, hidden_size=4, base_model=kind)
    head = network.fc_out.weight.clone()
    copied_names = copy_shared_weights(network, earlier)
    assert copied_names == [n for n in earlier.state_dict() if n.startswith("rnn.")]
    assert torch.equal(network.rnn.weight_hh_l1, earlier.rnn.weight_hh_l1)
    # The head has one output, not two, so it is not copied.
    assert torch.equal(network.fc_out.weight, head)
    with pytest.raises(ConfigError, match="share no weight"):
        copy_shared_weights(MLP(d_feat=3, layers=(4,)), earlier)


def sgd_task(make_window_task, network, path, **options):
    """A task whose weights stay those that it starts from."""
    options = {"optimizer": {"_target_": "torch.optim.SGD", "lr": 0.0}, **options}
    return make_window_task(network, init_from=f"file:{path}", **options)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["pkl", "safetensors"])
def test_gats_starts_from_a_file_of_weights(suffix, store, make_window_task, tmp_path, monkeypatch):
    lstm = LSTM(d_feat=5, **SIZE)
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pkl":
        torch.save(lstm.state_dict(), path)
    else:
        save_file(lstm.state_dict(), path)
    monkeypatch.chdir(tmp_path)
    run = task_train(sgd_task(make_window_task, GATS_NETWORK, path.name, batch=DAYS), "second")
    weights = network_state(run)
    assert all(torch.equal(weights[name], value) for name, value in lstm.state_dict().items())
    assert run.load_object("fit_report")["init_from"]["from"] == f"file:{path}"
    # The path of the stored task does not depend on the working folder.
    assert run.load_object("task")["model"]["init_from"] == f"file:{path}"


def test_add_takes_the_recurrent_weights_of_a_file():
    gru = GRU(d_feat=3, hidden_size=4)
    network = ADD(d_feat=3, hidden_size=4, base_model="GRU")
    copied_names = copy_shared_weights(network, gru.state_dict())
    assert copied_names == [f"enc_excess.{name}" for name, _ in gru.rnn.named_parameters()]
    assert torch.equal(network.enc_excess.weight_hh_l1, gru.rnn.weight_hh_l1)
    with pytest.raises(ConfigError, match=r"an? ADD and the file's weights differ .*\[12, 3\]"):
        copy_shared_weights(ADD(d_feat=3, hidden_size=8), gru.state_dict())


def test_a_file_that_does_not_exist_is_found_before_data_are_read(tmp_path):
    model = {"_target_": "qtorch.model.LightningModel", "network": GATS_NETWORK}
    model["init_from"] = f"file:{tmp_path / 'no.pkl'}"
    task = {"model": model, "dataset": {"_target_": "qtorch.data.DatasetH", "handler": "file:no"}}
    with pytest.raises(ConfigError, match=r"there is no file .*no.pkl.*leave init_from out"):
        check_task(task)
    # The machine that trains may be another one.
    init_instance_by_config(model).check_settings(check_device=False)


def test_a_file_without_weights_says_what_was_expected(tmp_path):
    expected = r"torch.save\(network.state_dict\(\), PATH\)"
    with pytest.raises(ConfigError, match="there is no file"):
        load_weights_file(str(tmp_path / "no.pkl"))
    (tmp_path / "text.pkl").write_text("weights")
    with pytest.raises(ConfigError, match=expected):
        load_weights_file(str(tmp_path / "text.pkl"))
    (tmp_path / "text.safetensors").write_text("weights")
    with pytest.raises(ConfigError, match=expected):
        load_weights_file(str(tmp_path / "text.safetensors"))
    torch.save(GRU(d_feat=3), tmp_path / "module.pkl")  # a pickle of an object is not loaded
    with pytest.raises(ConfigError, match=expected):
        load_weights_file(str(tmp_path / "module.pkl"))
    torch.save({"state_dict": GRU(d_feat=3).state_dict()}, tmp_path / "checkpoint.pkl")
    with pytest.raises(ConfigError, match=rf"contains \['state_dict'\]: .*{expected}"):
        load_weights_file(str(tmp_path / "checkpoint.pkl"))
    for wrong in ("file:", "fil:x"):
        with pytest.raises(ConfigError, match="or 'file:PATH'"):
            LightningModel(GATS_NETWORK, init_from=wrong)
