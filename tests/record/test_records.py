"""Signal records: artifacts, metrics and errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from qtorch.core.errors import RecordError
from qtorch.record import Record, SegmentICRecord, SigAnaRecord, SignalMseRecord, SignalRecord


def test_signal_record_writes_scores_and_raw_label(model, dataset, recorder):
    SignalRecord(model, dataset, recorder).generate()
    pred, label = recorder.load_object("pred.pkl"), recorder.load_object("label.pkl")
    assert list(pred.columns) == ["score"]
    assert list(label.columns) == ["LABEL0"]
    assert ("test", "label", "raw") in dataset.requests
    np.testing.assert_allclose(pred["score"], model.predict(dataset), rtol=1e-6)


@pytest.mark.slow
def test_signal_metrics_match_independent_computation(model, dataset, recorder):
    SignalRecord(model, dataset, recorder).generate()
    SigAnaRecord(recorder, ana_long_short=True).generate()
    score, label = model.predict(dataset), dataset.prepare("test").iloc[:, 0]
    days = [(s.to_numpy(), label.loc[d].to_numpy()) for d, s in score.droplevel(1).groupby(level=0)]
    ic = np.array([stats.pearsonr(s, y)[0] for s, y in days])
    rank = np.array([stats.spearmanr(s, y)[0] for s, y in days])
    spread = np.array(
        [(y[np.argsort(-s)[:5]].mean() - y[np.argsort(s)[:5]].mean()) / 2 for s, y in days]
    )
    average = np.array([y.mean() for _, y in days])
    expected_metrics = {
        "IC": ic.mean(),
        "ICIR": ic.mean() / ic.std(ddof=1),
        "Rank IC": rank.mean(),
        "Rank ICIR": rank.mean() / rank.std(ddof=1),
        "Long-Short Ann Return": spread.mean() * 252,
        "Long-Short Ann Sharpe": spread.mean() / spread.std(ddof=1) * 252**0.5,
        "Long-Avg Ann Return": average.mean() * 252,
        "Long-Avg Ann Sharpe": average.mean() / average.std(ddof=1) * 252**0.5,
    }
    metrics = recorder.list_metrics()
    assert {k: metrics[k] for k in expected_metrics} == pytest.approx(expected_metrics, rel=1e-5)
    np.testing.assert_allclose(recorder.load_object("sig_analysis/ic.pkl"), ic, rtol=1e-5)
    np.testing.assert_allclose(recorder.load_object("sig_analysis/ric.pkl"), rank, rtol=1e-5)
    stored_returns = recorder.load_object("sig_analysis/long_short_r.pkl")
    np.testing.assert_allclose(stored_returns, spread, rtol=1e-5)
    assert len(recorder.load_object("sig_analysis/long_avg_r.pkl")) == 40
    chart = Path(recorder.download_artifact("sig_analysis/ic.png"))
    assert chart.read_bytes()[:4] == b"\x89PNG"


def test_mean_squared_error_of_samples_with_score_and_label(model, dataset, recorder):
    SignalRecord(model, dataset, recorder).generate()
    score, label = (recorder.load_object(n).copy() for n in ("pred.pkl", "label.pkl"))
    score.iloc[3], label.iloc[:2] = np.nan, np.nan
    recorder.save_objects(**{"pred.pkl": score, "label.pkl": label.iloc[::-1]})
    metrics = SignalMseRecord(recorder).generate()
    keep = [k for k in range(len(score)) if k not in (0, 1, 3)]
    difference = score["score"].to_numpy(np.float64)[keep] - label["LABEL0"].to_numpy()[keep]
    expected = {"MSE": np.square(difference).mean(), "RMSE": np.square(difference).mean() ** 0.5}
    assert metrics == pytest.approx(expected)
    assert {k: recorder.list_metrics()[k] for k in expected} == metrics
    assert recorder.load_object("sig_analysis/mse.pkl") == metrics["MSE"]
    assert recorder.load_object("sig_analysis/rmse.pkl") == metrics["RMSE"]
    recorder.save_objects(**{"label.pkl": label * np.nan})
    with pytest.raises(RecordError, match=r"none of the .* samples has both a score and a label"):
        SignalMseRecord(recorder).generate()
    with pytest.raises(RecordError, match="label_col=1"):
        SignalMseRecord(recorder, label_col=1).generate()


@pytest.mark.slow
def test_long_short_analysis_is_optional(model, dataset, recorder):
    SignalRecord(model, dataset, recorder).generate()
    SigAnaRecord(recorder).generate()
    assert not [k for k in recorder.list_metrics() if "Long" in k]
    assert SigAnaRecord(recorder).list() == ["ic.pkl", "ric.pkl"]


@pytest.mark.slow
def test_skip_existing(model, dataset, recorder):
    SignalRecord(model, dataset, recorder).generate()
    record = SigAnaRecord(recorder, skip_existing=True)
    assert record.generate() is not None
    assert record.generate() is None


def test_missing_dependency_raises_with_its_name(recorder):
    with pytest.raises(RecordError, match=r"needs pred\.pkl, label\.pkl.*Run SignalRecord before"):
        SigAnaRecord(recorder).generate()
    with pytest.raises(RecordError, match=r"sig_analysis/x\.pkl, x\.pkl"):
        SigAnaRecord(recorder).load("x.pkl")
    with pytest.raises(RecordError, match=r"sig_analysis/ic\.pkl, sig_analysis/ric\.pkl"):
        SigAnaRecord(recorder).check(include_self=True, parents=False)


def test_load_searches_the_dependencies(model, dataset, recorder):
    SignalRecord(model, dataset, recorder).generate()
    record = SigAnaRecord(recorder)
    record.check()
    assert len(record.load("pred.pkl")) == 1000
    with pytest.raises(RecordError):
        record.load("pred.pkl", parents=False)


def test_invalid_label_column_raises(model, dataset, recorder):
    SignalRecord(model, dataset, recorder).generate()
    with pytest.raises(RecordError, match=r"label_col=1.*LABEL0"):
        SigAnaRecord(recorder, label_col=1).generate()


def test_undefined_ic_on_all_days_raises(model, dataset, recorder, monkeypatch):
    SignalRecord(model, dataset, recorder).generate()
    first_scores = recorder.load_object("pred.pkl").groupby(level="datetime").head(1)
    recorder.save_objects(**{"pred.pkl": first_scores})
    with pytest.raises(RecordError, match="two instruments"):
        SigAnaRecord(recorder).generate()


def test_equal_scores_are_named_as_the_reason(model, dataset, recorder):
    SignalRecord(model, dataset, recorder).generate()
    recorder.save_objects(**{"pred.pkl": 0 * recorder.load_object("pred.pkl") + 0.1})
    with pytest.raises(RecordError, match="all instruments of a day the same score"):
        SigAnaRecord(recorder).generate()


@pytest.mark.slow
def test_ic_by_segment(model, dataset, recorder):
    SignalRecord(model, dataset, recorder).generate()
    SigAnaRecord(recorder).generate()
    model.requests.clear()
    SegmentICRecord(
        model, dataset, recorder, segments=("train", "valid", "test", "none")
    ).generate()
    metrics = recorder.list_metrics()
    assert model.requests == ["train", "valid"]  # the scores of the test segment are loaded
    assert metrics["test.Rank IC"] == pytest.approx(metrics["Rank IC"], rel=1e-9)
    assert len({metrics[f"{s}.ICIR"] for s in ("train", "valid", "test")}) == 3


def test_record_without_a_run_raises(model, dataset):
    with pytest.raises(RecordError, match=r"R\.start"):
        SignalRecord(model, dataset).generate()


def test_current_run_is_the_default(model, dataset, recorder):
    SignalRecord(model, dataset).generate()
    assert "pred.pkl" in recorder.list_artifacts()


def test_signal_record_without_dataset_raises(model, recorder):
    with pytest.raises(RecordError, match="needs a dataset"):
        SignalRecord(model, recorder=recorder).generate()


def test_user_defined_record(recorder):
    class UserRecord(Record):
        artifact_path = "mine"

        def generate(self):
            self.save(figure={"a": 1})

    UserRecord(recorder).generate()
    assert UserRecord(recorder).load("figure") == {"a": 1}
