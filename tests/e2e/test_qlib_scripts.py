"""Programs as Qlib's users write them, which `install()` lets run here unchanged."""

from __future__ import annotations

import sys

import pytest

from qtorch.compat import qlib as compat
from qtorch.data import SyntheticSource, write_qlib

SEGMENTS = {
    "train": ("2018-02-01", "2018-12-28"),
    "valid": ("2019-01-02", "2019-02-28"),
    "test": ("2019-03-01", "2019-06-14"),
}
pytestmark = pytest.mark.slow


@pytest.fixture
def provider(monkeypatch, tmp_path):
    """A market in Qlib's layout; the working folder is empty, and Qlib's names are ours."""
    source = SyntheticSource(8, "2018-01-01", "2019-06-28", signal=0.3, seed=2)
    frame = source.load().to_frame()
    names = {n: "SH000300" if n == "MARKET" else f"SH60000{n[1:]}" for n in frame.index.levels[1]}
    frame.index = frame.index.set_levels([names[n] for n in frame.index.levels[1]], level=1)
    members = [name for name in names.values() if name != "SH000300"]
    folder = write_qlib(frame, tmp_path / "cn_data", universes={"csi300": members})
    monkeypatch.chdir(tmp_path)
    for name in [n for n in sys.modules if n.partition(".")[0] == "qlib"]:
        monkeypatch.delitem(sys.modules, name)
    compat.install()
    yield str(folder)
    compat.uninstall()


def linear_task() -> dict:
    """A task in Qlib's names."""
    from qlib.tests.config import get_record_lgb_config

    task = get_record_lgb_config(
        dataset_kwargs=SEGMENTS,
        handler_kwargs={
            "start_time": "2018-01-01",
            "end_time": "2019-06-28",
            "instruments": "csi300",
        },
    )
    handler = task["dataset"]["kwargs"]["handler"]["kwargs"]
    handler["infer_processors"] = [
        {"class": "RobustZScoreNorm", "kwargs": {"fields_group": "feature", "clip_outlier": True}},
        {"class": "Fillna", "kwargs": {"fields_group": "feature"}},
    ]
    model = {"class": "LinearModel", "module_path": "qlib.contrib.model.linear"}
    return {**task, "model": {**model, "kwargs": {"estimator": "ridge", "alpha": 0.05}}}


def test_workflow_by_code_and_the_notebook_that_reads_it(provider):
    import pandas as pd
    import qlib
    from qlib.backtest import backtest, executor
    from qlib.constant import REG_CN
    from qlib.contrib.evaluate import backtest_daily, risk_analysis
    from qlib.contrib.strategy import TopkDropoutStrategy
    from qlib.data import D
    from qlib.tests.config import CSI300_BENCH
    from qlib.utils import flatten_dict, init_instance_by_config
    from qlib.utils.time import Freq
    from qlib.workflow import R
    from qlib.workflow.record_temp import PortAnaRecord, SigAnaRecord, SignalRecord

    qlib.init(provider_uri=provider, region=REG_CN)
    task = linear_task()
    handler = task["dataset"]["kwargs"]["handler"]["kwargs"]
    handler["fit_start_time"], handler["fit_end_time"] = SEGMENTS["train"]
    model = init_instance_by_config(task["model"])
    dataset = init_instance_by_config(task["dataset"])
    span = {"start_time": SEGMENTS["test"][0], "end_time": SEGMENTS["test"][1]}
    backtest_config = {
        **span,
        "account": 100000000,
        "benchmark": CSI300_BENCH,
        "exchange_kwargs": {
            "freq": "day",
            "limit_threshold": 0.095,
            "deal_price": "close",
            "open_cost": 0.0005,
            "close_cost": 0.0015,
            "min_cost": 5,
        },
    }
    port_analysis_config = {
        "executor": {
            "class": "SimulatorExecutor",
            "module_path": "qlib.backtest.executor",
            "kwargs": {"time_per_step": "day", "generate_portfolio_metrics": True},
        },
        "strategy": {
            "class": "TopkDropoutStrategy",
            "module_path": "qlib.contrib.strategy.signal_strategy",
            "kwargs": {"signal": (model, dataset), "topk": 3, "n_drop": 1},
        },
        "backtest": backtest_config,
    }
    with R.start(experiment_name="workflow"):
        R.log_params(**flatten_dict(task))
        model.fit(dataset)
        R.save_objects(**{"params.pkl": model})
        recorder = R.get_recorder()
        SignalRecord(model, dataset, recorder).generate()
        SigAnaRecord(recorder).generate()
        PortAnaRecord(recorder, port_analysis_config, "day").generate()
    assert recorder.list_params()["model.kwargs.alpha"] == "0.05"

    recorder = R.get_recorder(recorder_id=recorder.id, experiment_name="workflow")
    pred_df = recorder.load_object("pred.pkl")
    report_normal_df = recorder.load_object("portfolio_analysis/report_normal_1day.pkl")
    analysis_df = recorder.load_object("portfolio_analysis/port_analysis_1day.pkl")
    strategy = TopkDropoutStrategy(topk=3, n_drop=1, signal=pred_df)
    executor_obj = executor.SimulatorExecutor(time_per_step="day", generate_portfolio_metrics=True)
    portfolio, indicators = backtest(executor=executor_obj, strategy=strategy, **backtest_config)
    analysis_freq = "{}{}".format(*Freq.parse("day"))
    report, positions = portfolio.get(analysis_freq)
    pd.testing.assert_frame_equal(report, report_normal_df, check_freq=False, check_names=False)
    assert list(indicators[analysis_freq][0])[:3] == ["ffr", "pa", "pos"]
    last = positions[report.index[-1]]
    assert last.calculate_value() == pytest.approx(report["account"].iloc[-1])
    excess = risk_analysis(report["return"] - report["bench"], freq=analysis_freq)
    expected = analysis_df.loc["excess_return_without_cost"]
    pd.testing.assert_frame_equal(excess, expected, check_names=False)
    daily_report, _ = backtest_daily(**span, strategy=strategy)
    assert len(daily_report) == len(report)

    labels = D.features(D.instruments("csi300"), ["Ref($close, -1)/$close-1"], **span)
    labels.columns = ["label"]
    pred_label = pd.concat([labels, pred_df.swaplevel()], axis=1, sort=True).reindex(labels.index)
    pytest.importorskip("plotly", reason="the graphs need plotly")
    from qlib.contrib.report import analysis_model, analysis_position

    stored_positions = recorder.load_object("portfolio_analysis/positions_normal_1day.pkl")
    show = {"show_notebook": False}
    figures = [
        *analysis_position.report_graph(report_normal_df, **show),
        *analysis_position.risk_analysis_graph(analysis_df, report_normal_df, **show),
        *analysis_position.score_ic_graph(pred_label, **show),
        *analysis_position.cumulative_return_graph(positions, report, labels, **show),
        *analysis_position.rank_label_graph(stored_positions, labels, **show),
        *analysis_model.model_performance_graph(pred_label, **show),
    ]
    assert len(figures) == 1 + 5 + 1 + 4 + 3 + 6


def test_rolling_tasks_with_and_without_a_pool(provider, tmp_path):
    import qlib
    from qlib.model.ens.group import RollingGroup
    from qlib.model.trainer import TrainerR, TrainerRM, task_train
    from qlib.workflow import R
    from qlib.workflow.task.collect import RecorderCollector
    from qlib.workflow.task.gen import RollingGen, task_generator
    from qlib.workflow.task.manage import TaskManager, run_task
    from qlib.workflow.task.utils import list_recorders

    # Qlib's form of a MongoDB database; the store is a file here.
    mongo_conf = {"task_url": f"sqlite:///{tmp_path}/", "task_db_name": "pool.db"}
    qlib.init(provider_uri=provider, region="cn", mongo=mongo_conf)
    rolling_gen = RollingGen(step=40, rtype=RollingGen.ROLL_SD)
    tasks = task_generator(tasks=[linear_task()], generators=rolling_gen)
    assert len(tasks) == 2

    def rec_key(recorder):
        task_config = recorder.load_object("task")
        model_key = task_config["model"]["class"]
        return model_key, task_config["dataset"]["kwargs"]["segments"]["test"]

    predictions = []
    for number, trainer in enumerate((TrainerR("e0"), TrainerRM("e1", "pool"))):
        trainer.train(tasks)
        collector = RecorderCollector(
            experiment=f"e{number}",
            process_list=RollingGroup(),
            rec_key_func=rec_key,
            rec_filter_func=lambda recorder: rec_key(recorder)[0] == "LinearModel",
        )
        predictions.append(collector()["pred"]["LinearModel",])
    assert predictions[0].equals(predictions[1])
    first_day = predictions[0].index.get_level_values(0).min()
    assert str(first_day.date()) == SEGMENTS["test"][0]

    # A worker of another program takes a definition in Qlib's names.
    manager = TaskManager(task_pool="own")
    manager.create_task(tasks[:1])
    assert run_task(task_train, "own", experiment_name="e2")
    assert manager.task_stat() == {"done": 1}
    recorders = list_recorders("e2", lambda recorder: recorder.status == "FINISHED")
    assert len(recorders) == 1
    experiment = R.get_exp(experiment_name="e2")
    for recorder_id in experiment.list_recorders():
        experiment.delete_recorder(recorder_id)
    assert not experiment.list_recorders()
