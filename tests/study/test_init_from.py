"""Warm starts between architectures: a network begins with what it shares with another run's."""

from __future__ import annotations

import pytest
import torch

from qtorch import R
from qtorch.core.errors import ConfigError, DataError, TrackingError
from qtorch.core.identity import fit_id
from qtorch.model.initial import warm_weights
from qtorch.model.lightning_model import LightningModel
from qtorch.nn import GRU, HIST, LSTM, MLP, GATs
from qtorch.tracking.lineage import DEPTH_TAG, FROM_TAG, PARENT_TAG
from qtorch.trainer import task_train

SIZE = {"hidden_size": 6, "num_layers": 1}
LSTM_NETWORK = {"_target_": "qtorch.nn.LSTM", **SIZE}
GATS_NETWORK = {"_target_": "qtorch.nn.GATs", "base_model": "LSTM", "dropout": 0.0, **SIZE}
DAYS = {"order": "day", "days_per_batch": 8}


def state(recorder) -> dict[str, torch.Tensor]:
    return recorder.load_object("params.pkl").network_.state_dict()


@pytest.fixture
def windowed(make_task):
    """`windowed(network, **model)`: a task over windows of four days, without records."""

    def make(network, columns=None, step_len=4, **model):
        task = make_task(network=network, record=[])
        task["model"].update(model)
        task["dataset"].update(_target_="qtorch.data.TSDatasetH", step_len=step_len)
        if columns is not None:
            task["dataset"]["handler"]["columns"] = columns
        return task

    return make


def gats_task(windowed, init_from, **options):
    options = {"batch": DAYS, "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.0}, **options}
    return windowed(options.pop("network", GATS_NETWORK), init_from=init_from, **options)


@pytest.mark.slow
def test_gats_begin_with_the_states_of_an_lstm(store, windowed):
    earlier = task_train(windowed(LSTM_NETWORK), "first")
    before = earlier.list_tags(), sorted(earlier.list_artifacts())
    task = gats_task(windowed, f"run:{earlier.id}")
    run = task_train(task, "second")

    # At a rate of zero the weights are those that it began with.
    given, own = state(earlier), state(run)
    assert all(torch.equal(own[name], given[name]) for name in given)
    assert set(own) - set(given) == {"transformation.weight", "transformation.bias", "a",
                                     "fc.weight", "fc.bias"}  # fmt: skip
    tags = run.list_tags()
    assert (tags[FROM_TAG], tags[DEPTH_TAG], tags[PARENT_TAG]) == (earlier.id, "1", earlier.id)
    report = run.load_object("fit_report")["init_from"]
    assert report == {"from": f"run:{earlier.id}", "weights": list(given)}
    assert (earlier.list_tags(), sorted(earlier.list_artifacts())) == before

    # The task is data: another run to begin from is another training, and the run keeps it.
    assert fit_id(task, "") != fit_id(gats_task(windowed, "run:another"), "")
    assert run.load_object("task")["model"]["init_from"] == f"run:{earlier.id}"
    model = run.load_object("params.pkl")
    assert model.to_config()["init_from"] == f"run:{earlier.id}"
    dataset = run.load_object("dataset")
    model.finetune(dataset)  # goes on from its own weights, whatever became of that run
    assert "init_from" not in model.fit_report_


@pytest.mark.slow
def test_features_are_matched_by_name_and_windows_may_be_longer(store, windowed):
    columns = ["KMID", "KLEN", "ROC5", "MA5", "STD5"]
    earlier = task_train(windowed(LSTM_NETWORK, columns), "first")
    init = f"run:{earlier.id}"
    runs = [
        task_train(gats_task(windowed, init, columns=c, step_len=5), "second")
        for c in (columns, columns[::-1])
    ]
    first, second = (r.load_object("params.pkl") for r in runs)
    assert second.learnt_.feature_names == tuple(columns)
    dataset = runs[1].load_object("dataset")
    assert torch.equal(
        torch.tensor(first.predict(dataset).to_numpy()),
        torch.tensor(second.predict(dataset).to_numpy()),
    )
    with pytest.raises(DataError, match=r"(?s)missing: STD5.*not know: STD10"):
        task_train(gats_task(windowed, init, columns=[*columns[:4], "STD10"]), "second")


@pytest.mark.slow
def test_what_cannot_begin_says_why(store, windowed):
    earlier = task_train(windowed(LSTM_NETWORK), "first")
    init = f"run:{earlier.id}"
    wider = {**GATS_NETWORK, "hidden_size": 8}
    shapes = (
        r"GATs and the run's LSTM differ .*rnn.weight_ih_l0 \[32, 5\] and \[24, 5\].*base_model"
    )
    with pytest.raises(ConfigError, match=shapes):
        task_train(gats_task(windowed, init, network=wider), "second")
    with pytest.raises(
        ConfigError, match=r"share no weight but the head's.*fc_out.weight \[1, 6\]"
    ):
        mlp = {"_target_": "qtorch.nn.MLP", "layers": [4]}
        task_train(gats_task(windowed, init, network=mlp), "second")
    with pytest.raises((ConfigError, TrackingError), match="f" * 32):
        task_train(gats_task(windowed, "run:" + "f" * 32), "second")
    with pytest.raises(ConfigError, match="init_model"):
        task_train(gats_task(windowed, f"{init}/init_model"), "second")
    with R.start(experiment_name="first"):
        R.save_objects(**{"params.pkl": {"not": "a model"}})
        other = R.get_recorder().id
    with pytest.raises(ConfigError, match="holds no fitted network"):
        task_train(gats_task(windowed, f"run:{other}"), "second")
    for wrong in (earlier.id, "run:", f"rum:{earlier.id}"):
        with pytest.raises(ConfigError, match="expected 'run:RUN_ID'"):
            LightningModel(GATS_NETWORK, init_from=wrong)
    with pytest.raises(ConfigError, match="must be plain data"):
        LightningModel(GATS_NETWORK, init_from=LightningModel(LSTM_NETWORK))


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("target", [GATs, HIST])
def test_both_graph_networks_take_both_recurrent_ones(kind, target):
    torch.manual_seed(0)
    earlier = {"LSTM": LSTM, "GRU": GRU}[kind](d_feat=3, hidden_size=4, num_outputs=2)
    network = target(d_feat=3, hidden_size=4, base_model=kind)
    head = network.fc_out.weight.clone()
    taken = warm_weights(network, earlier)
    assert taken == [n for n in earlier.state_dict() if n.startswith("rnn.")]
    assert torch.equal(network.rnn.weight_hh_l1, earlier.rnn.weight_hh_l1)
    assert torch.equal(network.fc_out.weight, head)  # of one label, not of two
    with pytest.raises(ConfigError, match="share no weight"):
        warm_weights(MLP(d_feat=3, layers=(4,)), earlier)
