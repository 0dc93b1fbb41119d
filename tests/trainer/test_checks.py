"""What a task gets wrong is raised without its data being read."""

from __future__ import annotations

import pytest

from qtorch.cli.compose import compose_settings
from qtorch.core.errors import ConfigError, DataError, ExpressionError
from qtorch.core.instantiate import init_instance_by_config
from qtorch.data import SyntheticSource
from qtorch.model import LightningModel
from qtorch.record import PortAnaRecord
from qtorch.record.base import Record
from qtorch.trainer import task_train
from qtorch.trainer.checks import check_segments, check_task
from qtorch.trainer.segments import resolve_segments

pytestmark = pytest.mark.slow  # The full CI alone composes a configuration for each of them.

SIGNAL, ANALYSIS = (
    "{_target_: qtorch.record.SignalRecord}",
    "{_target_: qtorch.record.SigAnaRecord}",
)
OWN = "{_target_: test_checks.OwnScores}"
BACKTEST = "+record.3.config.backtest"
EXCHANGE = f"{BACKTEST}.exchange_kwargs"
DATES = "train: [2018-07-01,2019-06-30], valid: [2019-07-01,2019-12-31]"


class OwnMarket(SyntheticSource):
    """A source that knows its names from its bars."""


class OwnScores(Record):
    """A record of a user's own, which may write the scores."""

    def generate(self) -> None:
        """Do nothing."""


@pytest.fixture
def check(monkeypatch):
    """Return `check(*overrides)`: check the task of a configuration; data must not be read."""
    monkeypatch.setattr(SyntheticSource, "panel", lambda self: pytest.fail("data is read"))

    def check_overrides(*overrides: str) -> None:
        words = ["data=synthetic_tiny", *overrides]
        if "record=full" in words and not any(w.startswith("portfolio.topk") for w in words):
            words.append("portfolio.topk=10")  # of 30 instruments
        task = compose_settings("train", words)
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
        ("logger=true", "logger=true: the value of a config group is the name of one of its"),
        (
            "model.scheduler={scheduler: {_target_: torch.optim.lr_scheduler.StepLR, step_size: 1},"
            " frequency: 0}",
            "frequency of the scheduler is 0; expected a whole number of at least 1",
        ),
        ("+trainer.benchmark=yes", "trainer.benchmark is 'yes'; expected true or false"),
        ("+trainer.deterministic=no", "deterministic is 'no'; expected true, false or warn"),
        ("+trainer.barebones=true", "trainer.barebones turns off the checkpoints"),
        ("+trainer.strategy=dpp", "unknown trainer.strategy 'dpp'. Did you mean 'ddp'?"),
        ("+trainer.strategy=[ddp]", "trainer.strategy is ['ddp']; expected the name of a strategy"),
        ("+trainer.plugins=[x]", "'x' does not name a module"),
        ("+trainer.plugins=5", "Found invalid type for plugin 5"),
        (
            "+trainer.plugins=[{_target_: pytorch_lightning.plugins.io.AsyncCheckpointIO}]",
            "trainer.plugins has a AsyncCheckpointIO, but a fit has its own",
        ),
        ("+trainer.profiler=5", "trainer.profiler is 5; expected its name"),
        ("+trainer.max_time=5", "trainer.max_time is 5; expected DD:HH:MM:SS"),
        ("+trainer.default_root_dir=5", "trainer.default_root_dir is 5; expected a folder"),
        ("+trainer.min_epochs=-1", "trainer.min_epochs is -1; expected a whole number"),
        ("+trainer.limit_train_batches=0", "limit_train_batches is 0; expected a number of batch"),
        ("+trainer.num_nodes=2", "was not started on the other nodes"),
        (
            "model.scheduler={_target_: torch.optim.lr_scheduler.StepLR}",
            "the scheduler StepLR: missing a required argument: 'step_size'",
        ),
        (
            "model.scheduler={_target_: torch.optim.lr_scheduler.StepLR, step_size: 0}",
            "step_size of StepLR is 0; expected a whole number of at least 1",
        ),
        (
            "model.scheduler={_target_: torch.optim.lr_scheduler.StepLR, step_size: 5, gamma: x}",
            "gamma of StepLR is 'x'; expected a number",
        ),
        (
            "model.scheduler={_target_: torch.optim.lr_scheduler.OneCycleLR, max_lr: x}",
            "the scheduler OneCycleLR does not accept {'max_lr': 'x'}",
        ),
        (
            "model.scheduler={_target_: qtorch.model.WarmupCosine, warmup: -1}",
            "warmup is -1; expected at least 0",
        ),
        (
            "model.scheduler={_target_: torch.optim.lr_scheduler.SequentialLR, milestones: [1], "
            "schedulers: [{_target_: torch.optim.lr_scheduler.StepLR}]}",
            "the scheduler StepLR: missing a required argument: 'step_size'",
        ),
        (
            "model.scheduler={_target_: torch.nn.Identity}",
            "the scheduler is a Identity; expected one of torch.optim.lr_scheduler",
        ),
        ("+model.optimizer.betas=[0.9]", "Adam does not accept {'lr': 0.001, 'betas': [0.9]}"),
        ("model.optimizer={_target_: torch.nn.Identity}", "the optimizer is a Identity; expected"),
        ("seed=99999999999999999999", "expected at most 9223372036854775807"),
        ("dataset.step_len=100000", "step_len is 100000, but the data has 522 bars"),
        ("+dataset.extras=x", "extras is 'x'; expected a mapping"),
        ("task.reweighter=5", "int is not a reweighter"),
        ("+task.sed=5", "unknown key of the task 'sed'. Did you mean 'seed'?"),
        ("model.init_from=run:none", "init_from='run:none': could not read run none"),
        ("+trainer.check_val_every_n_epoch=0", "check_val_every_n_epoch is 0; expected a whole"),
        ("+callbacks.early_stop.min_delta=abc", "early_stop.min_delta is 'abc'; expected a number"),
        (
            "callbacks.lightning=[{_target_: pytorch_lightning.callbacks.EarlyStopping}]",
            "EarlyStopping cannot be built: EarlyStopping.__init__() missing 1 required",
        ),
        (
            "callbacks.lightning=[{_target_: pytorch_lightning.callbacks.LearningRateMonitor, "
            "logging_interval: steps}]",
            "LearningRateMonitor cannot be built: logging_interval should be `step` or `epoch`",
        ),
        ("trainer.precision=17", "Lightning rejects these trainer arguments: "),
        ("+trainer.max_time=tomorrow", "Lightning rejects these trainer arguments: "),
        ("+trainer.profiler=simpel", "Lightning rejects these trainer arguments: "),
        ("handler.infer_processors.0.col_list=[RESI6]", "Did you mean 'RESI60'"),
        ("segments.train=0.9", "each must be in (0, 1] and their sum at most 1"),
        ("segments.train=[2019-01-01,2018-01-01]", "must be all fractions or all dates"),
        ("dataset.step_len=0", "step_len"),
        ("+dataset.flt_col=labl", "Did you mean 'label'"),
        ("+dataset.flt_col=feature", "flt_col='feature' must be a group of one column, it has 158"),
        ("dataset.step_len=abc", "step_len of TSDatasetH is 'abc'; expected a whole number"),
        ("data.num_instruments=abc", "num_instruments of SyntheticSource is 'abc'"),
        ("+handler.vwap=[x]", "vwap of Alpha158 is ['x']; expected text or null"),
        ("model.network.hidden_size=-1", "hidden_size of LSTM is -1; expected at least 1"),
        ("model.network.dropout=2", "dropout of LSTM is 2; expected 0 to 1"),
        ("model.network.num_layers=1.5", "num_layers of LSTM is 1.5; expected a whole number"),
        ("model.batch.size=0", "batch.size is 0; expected a whole number of at least 1"),
        ("model.batch.drop_last=maybe", "batch.drop_last is 'maybe'; expected true or false"),
        ("model.checkpoint.every_n_steps=0", "checkpoint.every_n_steps is 0"),
        ("model.cuda_graph=maybe", "cuda_graph is 'maybe'; expected 'auto', true or false"),
        ("model.compile=maybe", "compile is 'maybe'; expected true or false"),
        ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val is -1"),
        ("trainer.gradient_clip_algorithm=vale", "Did you mean 'value'"),
        ("callbacks.early_stop.patience=-1", "early_stop.patience is -1"),
        ("callbacks.early_stop=soon", "early_stop is 'soon'; expected null, a patience"),
        ("callbacks.monitor=5", "monitor is 5; expected the name of a metric"),
        ("~segments.train", "no segment 'train', on which LightningModel is trained. Its segments"),
        ("~segments.test", "no segment 'test', of which SignalRecord stores the scores"),
        ("~segments.valid", "no segment 'valid', whose 'valid/loss' early_stop monitors"),
        ("segments={train: 0.999, valid: 1e-4, test: 1e-4}", "segment test=0.0001 contains no day"),
        ("+handler.start_time=now and then", "the data of the handler (now and then..None): "),
        ("+handler.fit_start_time=soon", "the fit window of RobustZScoreNorm (soon.."),
        (
            "+handler={fit_start_time: 2019-01-01, fit_end_time: 2020-03-31}",
            "which reaches beyond the train segment",
        ),
        ("+dataset.horizon=-2", "horizon is -2; expected a number of bars, at least 0"),
        ("task.model=5", "model is 5; expected a model with a method fit"),
        ("task.dataset=[5]", "dataset is [5]; expected a dataset or its configuration"),
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
        ("benchmark=300", "the benchmark (an instrument or a universe) 300 is not text"),
        ("portfolio.account={cash: 1e6, S99: 5}", "unknown instrument of the account 'S99'"),
        ("universe=[S01,S02]", "topk=10 is more than the 2 instruments"),
        ("portfolio.topk=1000", "topk=1000 is more than the 28 instruments of the test segment"),
        ("+record.3.config.executor={class: NestedExecutor}", "executor 'NestedExecutor' is not"),
        ("record.2.segments=[tset]", "segment of SegmentICRecord 'tset'. Did you mean 'test'"),
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
        ("portfolio.deal_price=clos", "Did you mean 'close'"),
        ("portfolio.limit_threshold=['$close>$hig','$close<1']", "Did you mean 'high'"),
        (
            "+handler.filter_pipe=[{filter_type: ExpressionDFilter, rule_expression: '$close>'}]",
            "the end|expected",
        ),
    ],
)
def test_wrong_expressions(override, message, check):
    with pytest.raises(ExpressionError, match=message):
        check("record=full", override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["universe=stoks"], "unknown universe 'stoks'. Did you mean 'stocks'"),
        (["universe=[S01,S99]"], "unknown instrument 'S99'. Did you mean 'S29'"),
        (["universe={S1: [[2019-01-01,2019-12-31]]}"], "unknown instrument 'S1'"),
        (["record=full", "benchmark=MARKT"], "benchmark .* 'MARKT'. Did you mean 'MARKET'"),
        (["record=full", "benchmark=[S01,S99]"], "instrument of the benchmark 'S99'"),
        (["record=full", f"{EXCHANGE}.codes=stoks"], "unknown universe 'stoks'"),
        (["record=full", f"{EXCHANGE}.codes=[S99]"], "unknown instrument 'S99'"),
        (["record=full", f"{EXCHANGE}.freq=30min"], "unknown frequency '30min'"),
        (["record=full", f"{BACKTEST}.start_time=2031-01-01"], "the backtest has no bar between"),
        ([f"segments={{{DATES}, test: [2025-01-01,2026-01-01]}}"], "segment 'test' .* has no rows"),
        (["+handler.end_time=2001-12-31"], r"the data of the handler \(None..2001-12-31\) has no"),
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
        "universe=[S01,S02,S03]",
        f"segments={{{DATES}, test: [2020-01-01,null]}}",
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


@pytest.mark.parametrize("benchmark", ["S07", "liquid", "[S07,S08]", "scored", "null"])
def test_right_benchmarks(benchmark, check):
    check("record=full", f"benchmark={benchmark}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("benchmark=MARKT", "Did you mean 'MARKET'"),
        ("portfolio.deal_price=clos", "Did you mean 'close'"),
    ],
)
def test_names_that_only_the_bars_tell_are_checked_before_the_training(
    override, message, monkeypatch
):
    options = ["debug=tiny", "record=full", "data._target_=test_checks.OwnMarket", override]
    task = compose_settings("train", options)["task"]
    task["dataset"]["segments"] = {"train": ["2018-07-01", "2019-09-30"], "test": ["2020", "2020"]}
    task["model"]["early_stop"] = None
    monkeypatch.setattr(LightningModel, "fit", lambda *_, **__: pytest.fail("a model is trained"))
    with pytest.raises(DataError, match=message):
        task_train(task, "exp")


def test_a_test_before_the_training_is_warned_about(caplog):
    dates = {"train": ("2019-07-01", "2019-12-31"), "test": ("2018-07-01", "2019-06-28")}
    task = compose_settings("train", ["data=synthetic_tiny", "segments={train: 1.0}"])["task"]
    dataset = init_instance_by_config({**task["dataset"], "segments": dates})
    check_segments(dataset, None)
    assert "the test segment (to 2019-06-28) is before the train segment" in caplog.text


def test_the_device_is_that_of_the_machine_that_trains():
    settings = ["data=synthetic_tiny", "trainer.accelerator=gpu", "trainer.devices=[99]"]
    task = compose_settings("train", settings)["task"]
    check_task(task, check_device=False)
    with pytest.raises(ConfigError, match="device 'cuda:99' does not exist"):
        check_task(task)


def test_portfolio_larger_than_a_table_that_was_read_for_its_calendar(tmp_path):
    bars = SyntheticSource(3, "2018-07-01", "2020-06-30").load(instruments="stocks")
    path = tmp_path / "bars.parquet"
    bars.to_frame().reset_index().to_parquet(path)
    settings = compose_settings("train", ["data=table", f"data.path={path}", "record=full"])
    task = resolve_segments(settings["task"])
    with pytest.raises(ConfigError, match="topk=50 is more than the 3 instruments of the test"):
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
