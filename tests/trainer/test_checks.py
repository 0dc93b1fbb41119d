"""What a task gets wrong is raised without its data being read."""

from __future__ import annotations

import pytest

from qtorch.cli.compose import compose_settings
from qtorch.core.errors import ConfigError, DataError, ExpressionError
from qtorch.data import SyntheticSource
from qtorch.record import PortAnaRecord
from qtorch.record.base import Record
from qtorch.trainer.checks import check_task

SIGNAL, ANALYSIS = (
    "{_target_: qtorch.record.SignalRecord}",
    "{_target_: qtorch.record.SigAnaRecord}",
)
OWN = "{_target_: test_checks.OwnScores}"


class OwnScores(Record):
    """A record of a user's own, which may write the scores."""

    def generate(self) -> None:
        """Do nothing."""


@pytest.fixture
def check(monkeypatch):
    """Return `check(*overrides)`: check the task of a configuration; data must not be read."""
    monkeypatch.setattr(SyntheticSource, "panel", lambda self: pytest.fail("data is read"))

    def check_overrides(*overrides: str) -> None:
        task = compose_settings("train", ["data=synthetic_tiny", *overrides])
        check_task(task["task"])

    return check_overrides


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.loss={mse: 1, icc: 2}", "unknown loss 'icc'. Did you mean 'ic'"),
        ("callbacks.monitor=icc", "Did you mean 'ic'"),
        ("+callbacks.early_stop.monitor=icc", "Did you mean 'ic'"),
        ("model.optimizer=adamm", "unknown optimizer 'adamm'. Did you mean 'Adam'"),
        ("model.optimizer={lr: abc}", "Adam does not accept {'lr': 'abc'}"),
        ("model.optimizer._target_=torch.optim.Adamm", "Did you mean 'Adam'"),
        ("model.scheduler={_target_: torch.optim.lr_scheduler.StepLRR}", "Did you mean 'StepLR'"),
        ("trainer.accelerator=gpuu", "unknown trainer.accelerator 'gpuu'"),
        ("model.batch.order=ranom", "Did you mean 'random'"),
        ("model.inner_steps=0", "inner_steps is 0"),
        ("+model.day_label={zscores: true}", "Did you mean 'zscore'"),
        ("model.network={_target_: no_such_module.Mean}", "no module named 'no_such_module'"),
        ("+model.network.hiden=3", "unknown argument of LSTM 'hiden'"),
        ("callbacks.lightning=[{_target_: pytorch_lightning.callbacks.Timerr}]", "'Timer'"),
        ("handler.infer_processors=[{_target_: qtorch.data.processor.Fillnaa}]", "'Fillna'"),
        (
            "handler.infer_processors=[{class: no_such_module.Own}]",
            "no module named 'no_such_module'",
        ),
        ("task.reweighter={_target_: no_such_module.Weights}", "no module named 'no_such_module'"),
        ("trainer.precision=17", "Lightning rejects these trainer arguments: "),
        ("+trainer.max_time=tomorrow", "Lightning rejects these trainer arguments: "),
        ("+trainer.profiler=simpel", "Lightning rejects these trainer arguments: "),
        ("handler.infer_processors.0.col_list=[RESI6]", "Did you mean 'RESI60'"),
        ("segments.train=0.9", "each must be in (0, 1] and their sum at most 1"),
        ("segments.train=[2019-01-01,2018-01-01]", "must be all fractions or all dates"),
        ("dataset.step_len=0", "step_len"),
        ("dataset.step_len=abc", "step_len of TSDatasetH is 'abc'; expected a whole number"),
        ("data.num_instruments=abc", "num_instruments of SyntheticSource is 'abc'"),
        ("+handler.vwap=[x]", "vwap of Alpha158 is ['x']; expected text or null"),
        ("model.network.hidden_size=-1", "hidden_size of LSTM is -1; expected at least 1"),
        ("model.network.dropout=2", "dropout of LSTM is 2; expected 0 to 1"),
        ("model.network.num_layers=1.5", "num_layers of LSTM is 1.5; expected a whole number"),
        ("model.batch.size=0", "batch.size is 0; expected a whole number of at least 1"),
        ("model.batch.drop_last=maybe", "batch.drop_last is 'maybe'; expected true or false"),
        ("model.checkpoint.every_n_steps=0", "checkpoint.every_n_steps is 0"),
        ("model.compile=maybe", "compile is 'maybe'; expected true or false"),
        ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val is -1"),
        ("trainer.gradient_clip_algorithm=vale", "Did you mean 'value'"),
        ("callbacks.early_stop.patience=-1", "early_stop.patience is -1"),
        ("callbacks.early_stop=soon", "early_stop is 'soon'; expected null, a patience"),
        ("callbacks.monitor=5", "monitor is 5; expected the name of a metric"),
        ("seed=-1", "seed is -1; expected a whole number of at least 0"),
        ("region=uk", "unknown region 'uk'"),
        ("task.record=5", "record is 5; expected a list"),
        (f"task.record=[{ANALYSIS}]", "SigAnaRecord needs the SignalRecord before it"),
        (f"task.record=[{ANALYSIS},{SIGNAL}]", "SigAnaRecord needs the SignalRecord before it"),
        ("task.record=[{_target_: qtorch.record.SignalRecord, a: 3}]", "SignalRecord 'a'"),
    ],
)
def test_wrong_settings(override, message, check):
    with pytest.raises(ConfigError) as error:
        check(override)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("portfolio.topk=0", "topk=0: expected a whole number, at least 1"),
        ("portfolio.topk=many", "topk of TopkDropoutStrategy is 'many'; expected a whole number"),
        ("portfolio.account=-1", "account is -1; expected a positive number"),
        ("portfolio.deal_price=5", "deal_price=5: expected a field"),
        ("portfolio.open_cost=abc", "open_cost of Exchange is 'abc'; expected a number"),
        ("portfolio.delisting=zeroo", "Did you mean 'zero'"),
        ("portfolio.as_qlib=maybe", "as_qlib of backtest is 'maybe'; expected true or false"),
    ],
)
def test_wrong_settings_of_a_backtest(override, message, check):
    with pytest.raises(ConfigError) as error:
        check("record=full", override)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("handler.label='Ref($close,-2/$close'", "this parenthesis is never closed"),
        ("handler.label='Reff($close,-2)'", "Did you mean 'Ref'"),
        ("handler.label='Ref($clos,-2)'", "Did you mean 'close'"),
        (
            "+handler.filter_pipe=[{filter_type: ExpressionDFilter, rule_expression: '$close>'}]",
            "the end|expected",
        ),
    ],
)
def test_wrong_expressions(override, message, check):
    with pytest.raises(ExpressionError, match=message):
        check(override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["universe=stoks"], "unknown universe 'stoks'. Did you mean 'stocks'"),
        (["data=qlib", "data.provider_uri=nowhere"], "no data folder .*nowhere"),
        (["data=table", "data.path=nowhere.csv"], "no file or folder .*nowhere.csv"),
    ],
)
def test_data_that_does_not_exist(overrides, message, check):
    with pytest.raises(DataError, match=message):
        check(*overrides)
    check_task(compose_settings("train", overrides)["task"], check_device=False)  # elsewhere


@pytest.mark.parametrize(
    "override",
    [
        "record=full",
        "record=none",
        f"task.record=[{OWN},{ANALYSIS}]",
        "model.optimizer={lr: 1e-3}",
        "model=tra",
        "model=linear",
        "handler.label='Ref($close,-2)/$close'",
        "callbacks=rank_ic",
    ],
)
def test_right_settings(override, check):
    check(override)


def test_the_device_is_that_of_the_machine_that_trains():
    settings = ["data=synthetic_tiny", "trainer.accelerator=gpu", "trainer.devices=[99]"]
    task = compose_settings("train", settings)["task"]
    check_task(task, check_device=False)
    with pytest.raises(ConfigError, match="device 'cuda:99' does not exist"):
        check_task(task)


@pytest.mark.parametrize(
    "strategy",
    [
        {"class": "TopkDropoutStrategy", "kwargs": {"topk": 31, "n_drop": 1}},
        {"_target_": "qtorch.backtest.TopkDropoutStrategy", "topk": 31, "n_drop": 1},
    ],
)
def test_portfolio_larger_than_the_universe(strategy):
    record = PortAnaRecord(config={"strategy": strategy})
    with pytest.raises(ConfigError, match="topk=31 is more than the 30 instruments"):
        record.check_universe(30)
    record.check_universe(31)
    PortAnaRecord(config={"strategy": {"class": "no_such_module.Own", "kwargs": {"topk": 99}}})
