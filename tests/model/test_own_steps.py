"""Networks with a training step of their own: what the step learns by, and that it goes on."""

from __future__ import annotations

import pytest
import torch
from test_training import model_of, same, state_of
from toy_training import ToyDataset, ToyRecorder

from qtorch.core.errors import ConfigError
from qtorch.model.lightning_model import LightningModel

DAYS = {"order": "day", "days_per_batch": 4}
SMALL = {"hidden_size": 8, "num_layers": 1}


def own(name: str, by: str | None = None, **changes) -> LightningModel:
    """A small one of our networks, trained by its module."""
    config = {"_target_": f"qtorch.nn.{name}", **SMALL, **changes.pop("network", {})}
    step = {"_target_": f"qtorch.model.{by or name + 'Module'}"}
    step |= changes.pop("module", {})
    return model_of(config, module=step, **changes)


STEPS = {
    "IGMTF": {"network": {"k_day": 2, "n_neighbor": 3}, "batch": DAYS},
    "TRA": {"network": {"lookback": 4, "router_size": 4}, "module": {"pretrain": 1}},
    "ADARNN": {"module": {"pre_epoch": 1}},
    "TCTS": {"module": {"steps": 2}},
}
LABELS = {"TCTS": 3}
every = pytest.mark.parametrize("name", STEPS)


@pytest.fixture
def data(name: str) -> ToyDataset:
    return ToyDataset(num_labels=LABELS.get(name, 1))


@every
def test_it_learns_and_scores_each_sample_once(data: ToyDataset, name: str) -> None:
    model = own(name, trainer={"max_epochs": 12}, **STEPS[name])
    model.fit(data)
    scores = model.predict(data)
    assert scores.index.equals(data.samples("test").index)
    assert max(model.evals_result_["valid"]["ic"]) > 0.3


@every
def test_a_resumed_training_ends_with_the_same_weights(
    data: ToyDataset, name: str, tmp_path
) -> None:
    changes = {
        "monitor": "train_loss",
        "checkpoint": {"every_n_steps": 2},
        "trainer": {"max_epochs": 3},
        "inner_steps": 2,
        **STEPS[name],
    }
    whole = own(name, **changes)
    whole.fit(data)
    from qtorch.model import module as module_file

    stop = module_file.ScoreModule.training_step
    seen = 0

    def killed(self, steps):
        nonlocal seen
        seen += 1
        if seen == 5:
            raise RuntimeError("killed")
        stop(self, steps)

    first = own(name, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module_file.ScoreModule, "training_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            first.fit(data, recorder=ToyRecorder(tmp_path))
    second = own(name, **changes)
    second.fit(data, recorder=ToyRecorder(tmp_path))
    assert second.fit_report_["resumed_from"]
    assert same(state_of(second), state_of(whole))


@every
def test_the_module_refuses_another_network(data: ToyDataset, name: str) -> None:
    changes = {k: v for k, v in STEPS[name].items() if k != "network"}
    with pytest.raises(ConfigError, match=f"trains a {name}"):
        own("LSTM", f"{name}Module", **changes).fit(data)


@every
def test_a_saved_model_predicts_the_same(data: ToyDataset, name: str) -> None:
    model = own(name, trainer={"max_epochs": 1}, **STEPS[name])
    model.fit(data)
    again = LightningModel.from_state(model.to_state())
    assert again.predict(data).equals(model.predict(data))


def test_the_bank_of_igmtf_holds_the_train_days(dataset: ToyDataset) -> None:
    model = own("IGMTF", trainer={"max_epochs": 1}, **STEPS["IGMTF"])
    model.fit(dataset)
    state = state_of(model)
    samples = dataset.samples("train", data_key="learn")
    assert state["bank_mask"].sum() == len(samples)
    assert len(state["bank_day"]) == samples.num_days
    fewer = own("IGMTF", module={"num_bank_days": 5}, trainer={"max_epochs": 1}, **STEPS["IGMTF"])
    fewer.fit(dataset)
    assert len(state_of(fewer)["bank_day"]) == 5
    torch.testing.assert_close(state["bank_day"].shape[1], 8)
