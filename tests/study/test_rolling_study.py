"""Tests of rolling studies on a small market: windows, their runs, the stitched signal."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest

from qtorch import R
from qtorch.core.errors import ConfigError
from qtorch.core.instantiate import init_instance_by_config
from qtorch.core.session import session_context
from qtorch.data.handler.feature_cache import FeatureCache
from qtorch.data.handler.loader import QlibDataLoader
from qtorch.metrics.signal import calc_ic
from qtorch.model.lightning_model import LightningModel
from qtorch.record import PortAnaRecord
from qtorch.record.signal import raw_label
from qtorch.study import RecorderCollector, RollingEnsemble, StudyError, rolling_study
from qtorch.study.rolling import SPAN_TAG, WINDOW_TAG, StitchedDataset, rolling_tasks
from qtorch.tracking.recorder import PARENT_TAG
from qtorch.trainer import DelayTrainerR, TrainerR


def run_study(task, folder, trainer=None, **options):
    options = {"step": 40, "cache": str(folder / "features"), **options}
    return rolling_study(task, trainer, experiment_name="study", **options)


@pytest.fixture
def feature_calls(monkeypatch):
    """A list with one entry for each time that features were computed."""
    calls = []
    real = QlibDataLoader._compute_view
    monkeypatch.setattr(
        QlibDataLoader, "_compute_view", lambda self, *a: calls.append(1) or real(self, *a)
    )
    return calls


@pytest.mark.slow
def test_rolling_study_end_to_end(store, tmp_path, make_task, feature_calls):
    task = make_task()
    before = copy.deepcopy(task)
    result = run_study(task, tmp_path)
    assert task == before
    assert len(result.windows) == len(result.tasks) == 3
    assert len(feature_calls) == 1  # three windows and the stitched signal

    # The signal has every trading day of the test segment, and each sample once.
    days = result.prediction.index.get_level_values("datetime").unique()
    assert days[0] == pd.Timestamp("2019-01-01")
    assert days[-1] == pd.Timestamp("2019-05-31")
    assert days.equals(pd.bdate_range(days[0], days[-1]).rename("datetime").as_unit(days.unit))
    assert result.prediction.index.is_unique
    whole = make_task()["dataset"]
    whole["handler"]["end_time"] = "2019-05-31"
    samples = init_instance_by_config(whole).samples("test", data_key="infer")
    assert result.prediction.index.equals(samples.index)

    # The parent run has the signal and the results of the task's records.
    parent = R.get_recorder(recorder_id=result.recorder.id)
    assert parent.status == "FINISHED"
    pd.testing.assert_frame_equal(parent.load_object("pred.pkl"), result.prediction)
    metrics = parent.list_metrics()
    ic, _ = calc_ic(result.prediction["score"], parent.load_object("label.pkl").iloc[:, 0])
    assert metrics["IC"] == pytest.approx(ic.mean(), abs=1e-6)
    assert {"ICIR", "Rank IC", "window.IC"} <= metrics.keys()
    assert parent.list_params()["rolling.windows"] == "3"
    assert parent.load_object("task")["seed"] == 3

    # The windows are its child runs, in order.
    window_list = parent.load_object("rolling")
    assert [w["recorder_id"] for w in window_list] == [r.id for r in result.windows]
    for number, recorder in enumerate(result.windows):
        tags = R.get_recorder(recorder_id=recorder.id).list_tags()
        assert tags[PARENT_TAG] == parent.id
        assert tags[WINDOW_TAG] == str(number)
        assert tags[SPAN_TAG] == "..".join(window_list[number]["segments"]["test"])
        assert recorder.name.endswith(tags[SPAN_TAG])
    children = RecorderCollector(
        "study",
        [RollingEnsemble()],
        rec_filter_func=lambda r: r.list_tags().get(PARENT_TAG) == parent.id,
    )
    pd.testing.assert_frame_equal(children()["pred"], result.prediction)


@pytest.mark.slow
def test_results_do_not_depend_on_trainer_or_cache(store, tmp_path, make_task, feature_calls):
    reference = run_study(make_task(), tmp_path, cache=False)
    assert len(feature_calls) == 3
    for trainer in (TrainerR("study"), DelayTrainerR("study")):
        result = run_study(make_task(), tmp_path, trainer)
        pd.testing.assert_frame_equal(result.prediction, reference.prediction, check_exact=True)
    assert len(feature_calls) == 4


def test_windows_share_end_date_and_differ_in_segments(make_task, tmp_path):
    tasks = rolling_tasks(
        make_task(),
        step=25,
        rtype="sliding",
        horizon=3,
        trunc_days=None,
        cache=str(tmp_path),
        calendar=None,
        records=["SignalRecord"],
    )
    handlers = [t["dataset"]["handler"] for t in tasks]
    assert {h["end_time"] for h in handlers} == {"2019-05-31"}
    assert {h["cache"] for h in handlers} == {str(tmp_path)}
    assert {h["label"][0] for h in handlers} == {"Ref($close, -4)/Ref($close, -1) - 1"}
    assert len({t["dataset"]["segments"]["train"][0] for t in tasks}) == len(tasks)


@pytest.mark.slow
def test_window_equals_its_task_trained_alone(store, tmp_path, make_task):
    """Neither the shared end date nor the cache changes a window's scores."""
    from qtorch.task import RollingGen

    result = run_study(make_task(), tmp_path)
    window_task = RollingGen(40)(make_task())[1]
    (recorder,) = TrainerR("alone")([window_task])
    pd.testing.assert_frame_equal(
        recorder.load_object("pred.pkl"),
        result.windows[1].load_object("pred.pkl"),
        check_exact=True,
    )


@pytest.mark.slow
def test_failed_window_is_reported_and_others_are_kept(store, tmp_path, make_task, monkeypatch):
    real = LightningModel.fit

    def fit(self, dataset, *args, **options):
        if str(dataset.segments["test"][0]) > "2019-04-01":
            raise ValueError("no luck")
        return real(self, dataset, *args, **options)

    monkeypatch.setattr(LightningModel, "fit", fit)
    with pytest.raises(StudyError, match=r"1 of 3 windows did not finish.*window 2.*no luck"):
        run_study(make_task(), tmp_path)
    runs = list(R.list_recorders(experiment_name="study").values())
    assert sorted(r.status for r in runs) == ["FAILED"] * 2 + ["FINISHED"] * 2
    parent = next(r for r in runs if r.name == "rolling")
    assert parent.status == "FAILED"
    assert "no luck" in parent.list_tags()["error"]
    assert sum(r.list_tags().get(PARENT_TAG) == parent.id for r in runs) == 3


def portfolio_record(**backtest):
    strategy = {
        "_target_": "qtorch.backtest.TopkDropoutStrategy",
        "signal": "<PRED>", "topk": 5, "n_drop": 1,
    }  # fmt: skip
    config = {"strategy": strategy, "backtest": backtest}
    return {"_target_": "qtorch.record.PortAnaRecord", "config": config, "dataset": "<DATASET>"}


@pytest.mark.slow
def test_the_portfolio_of_the_stitched_signal_trades_the_bars_of_its_dataset(
    store, tmp_path, make_task
):
    task = make_task(record=["SignalRecord", portfolio_record()])
    result = run_study(task, tmp_path)
    report = result.recorder.load_object("portfolio_analysis/report_normal_1day.pkl")
    assert report["turnover"].sum() > 0
    named_source = portfolio_record(source=task["dataset"]["handler"]["source"])
    PortAnaRecord(result.recorder, named_source["config"]).generate()
    expected = result.recorder.load_object("portfolio_analysis/report_normal_1day.pkl")
    pd.testing.assert_frame_equal(report, expected)


@pytest.mark.slow
def test_records_of_windows_and_of_stitched_signal(store, tmp_path, make_task):
    record = [{"_target_": "qtorch.record.SegmentICRecord", "segments": ["valid", "test"]}]
    result = run_study(make_task(record=record), tmp_path, window_records=record)
    window = result.windows[0].list_metrics()
    assert {"valid.IC", "test.IC"} <= window.keys()
    metrics = result.recorder.list_metrics()
    assert "test.IC" in metrics
    assert "valid.IC" not in metrics  # the stitched signal has no such segment
    assert "pred.pkl" in result.recorder.list_artifacts()


def test_label_of_a_stitched_dataset_takes_the_spans_of_a_dataset(make_task):
    task = make_task()
    task["dataset"]["segments"] = {"test": ("2019-01-01", "2019-01-31")}
    dataset = StitchedDataset([task], raw_label(init_instance_by_config(task["dataset"])))
    label = dataset.prepare("test", col_set="label", data_key="raw")
    assert "full_dataset" not in vars(dataset)
    (same_label,) = dataset.prepare(["test"], col_set="label", data_key="raw")
    assert len(same_label) == len(label)


def test_invalid_horizon_raises(store, tmp_path, make_task):
    with pytest.raises(ConfigError, match="expected at least 1"):
        run_study(make_task(), tmp_path, horizon=0)
    task_with_object = make_task()
    task_with_object["dataset"]["handler"] = object()
    with pytest.raises(ConfigError, match="label in a handler's configuration"):
        run_study(task_with_object, tmp_path, horizon=2)


# -- warm start ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_warm_window_starts_from_previous_window(store, tmp_path, make_task):
    cold = run_study(make_task(epochs=2), tmp_path)
    warm = run_study(make_task(epochs=2), tmp_path, warm_start=True)
    first, second, third = (r.load_object("params.pkl") for r in warm.windows[:3])
    # The first window is the same without a warm start; the later ones differ.
    warm_scores, cold_scores = (s.windows[0].load_object("pred.pkl") for s in (warm, cold))
    pd.testing.assert_frame_equal(warm_scores, cold_scores, check_exact=True)
    assert not np.allclose(
        warm.windows[1].load_object("pred.pkl"), cold.windows[1].load_object("pred.pkl")
    )
    # The second window equals a finetune of the first window's model.
    dataset = init_instance_by_config(warm.tasks[1]["dataset"])
    with session_context(seed=3):
        first.finetune(dataset)
    window_state, expected_state = second.model_.network_.state_dict(), first.network_.state_dict()
    assert all((window_state[k] == expected_state[k]).all() for k in window_state)
    # The lineage can be followed from the last window to the first.
    ids = [r.id for r in warm.windows]
    tags = [R.get_recorder(recorder_id=i).list_tags() for i in ids]
    assert [t.get("warm_start.from") for t in tags] == [None, *ids[:-1]]
    assert [t.get("warm_start.depth") for t in tags] == [None, "1", "2"]
    assert third.fit_report_["epochs"] == 2
    # The loaded model predicts the stored scores.
    prediction = third.predict(init_instance_by_config(warm.tasks[2]["dataset"]))
    stored_prediction = warm.windows[2].load_object("pred.pkl")["score"]
    pd.testing.assert_series_equal(prediction, stored_prediction, check_exact=True)


@pytest.mark.slow
def test_warm_start_options_and_failing_window(store, tmp_path, make_task, monkeypatch):
    options = {"trainer": {"max_epochs": 1}}
    warm = run_study(make_task(epochs=2), tmp_path, warm_start=options)
    assert [r.load_object("params.pkl").fit_report_["epochs"] for r in warm.windows] == [2, 1, 1]

    def failing_finetune(self, *args, **options):
        raise ValueError("no finetune today")

    monkeypatch.setattr(LightningModel, "finetune", failing_finetune)
    with pytest.raises(StudyError, match=r"window 1.*no finetune today"):
        run_study(make_task(), tmp_path, warm_start=True)


def test_warm_start_without_fitted_model_raises(store, tmp_path, make_task):
    from qtorch.core.errors import NotFittedError
    from qtorch.study import WarmStart

    with pytest.raises(NotFittedError, match="is not fitted"):
        WarmStart("x").predict(None)
    with R.start(experiment_name="e"):
        R.save_objects(**{"params.pkl": {"no": "model"}})
        run = R.get_recorder().id
    with pytest.raises(ConfigError, match="has no finetune"):
        WarmStart(run).fit(None)
    assert FeatureCache(tmp_path / "features").entries() == []
