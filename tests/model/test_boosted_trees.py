"""XGBoost and CatBoost against the libraries themselves on the same rows."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest
from toy_training import ToyDataset, ToyRecorder

from qtorch.core.errors import ArgumentError, ConfigError, NotFittedError
from qtorch.core.session import session_context
from qtorch.data import Reweighter
from qtorch.model import CatBoostModel, DEnsembleModel, LGBModel, ModelFT, XGBModel
from qtorch.tracking.artifacts import read_object, write_object

XGBOOST = {"max_depth": 3, "eta": 0.2, "nthread": 1, "seed": 3}
CATBOOST = {"depth": 3, "learning_rate": 0.2, "thread_count": 1, "random_seed": 3}


class LabelReweighter(Reweighter):
    """Give larger labels more weight."""

    def reweight(self, data: pd.DataFrame) -> pd.Series:
        return 1 + data["label"].iloc[:, 0].abs()


def load_rows(dataset: ToyDataset, segment: str) -> tuple[np.ndarray, np.ndarray]:
    """Return features and label through the DataFrame view of the samples."""
    frame = dataset.samples(segment, data_key="learn").frame(("feature", "label"))
    return frame["feature"].to_numpy(np.float32), frame["label"].to_numpy(np.float32)[:, 0]


def check_history(recorder: ToyRecorder, model: XGBModel | CatBoostModel, metric: str) -> None:
    history = recorder.history()
    assert {name for name, _ in history} == {f"train/{metric}", f"valid/{metric}"}
    curve = model.evals_result_["valid"][metric]
    assert [history[f"valid/{metric}", step] for step in range(len(curve))] == curve
    report = model.fit_report_
    assert report["best_value"] == min(curve) == curve[report["best_epoch"]]
    assert report["epochs"] == len(curve)
    assert report["monitor"] == f"valid/{metric}"


def test_xgboost_stops_early_and_scores_with_its_best_round(dataset, tmp_path):
    xgboost = pytest.importorskip("xgboost")
    recorder = ToyRecorder(tmp_path)
    model = XGBModel(early_stopping_rounds=5, num_boost_round=300, subsample=0.8, **XGBOOST)
    model.fit(dataset, LabelReweighter(), recorder=recorder)
    (x, y), (vx, vy) = (load_rows(dataset, s) for s in ("train", "valid"))
    train = xgboost.DMatrix(x, y, weight=1 + np.abs(y))
    valid = xgboost.DMatrix(vx, vy, weight=1 + np.abs(vy))
    curves: dict = {}
    booster = xgboost.train(
        {**XGBOOST, "subsample": 0.8},
        train,
        300,
        evals=[(valid, "valid")],
        early_stopping_rounds=5,
        evals_result=curves,
        verbose_eval=False,
    )
    best = booster.best_iteration
    tx, _ = load_rows(dataset, "test")
    expected = booster.predict(xgboost.DMatrix(tx), iteration_range=(0, best + 1))
    np.testing.assert_allclose(model.predict(dataset), expected, rtol=1e-5, atol=1e-6)
    assert model.booster.num_boosted_rounds() == best + 1 < 300
    assert model.evals_result_["valid"]["rmse"] == curves["valid"]["rmse"]
    check_history(recorder, model, "rmse")
    importance = model.get_feature_importance()
    assert set(importance.index) == {"F0", "F1", "F2", "F3"}
    assert importance.index[0] == "F0"  # the signal
    assert importance.is_monotonic_decreasing


def test_catboost_stops_early_and_keeps_its_best_round(dataset, tmp_path):
    catboost = pytest.importorskip("catboost")
    recorder = ToyRecorder(tmp_path)
    model = CatBoostModel(early_stopping_rounds=5, num_boost_round=300, task_type="CPU", **CATBOOST)
    model.fit(dataset, LabelReweighter(), recorder=recorder)
    (x, y), (vx, vy) = (load_rows(dataset, s) for s in ("train", "valid"))
    library_model = catboost.CatBoost(
        {**CATBOOST, "loss_function": "RMSE", "iterations": 300, "early_stopping_rounds": 5,
         "logging_level": "Silent", "allow_writing_files": False}
    )  # fmt: skip
    library_model.fit(
        catboost.Pool(x, y, weight=1 + np.abs(y)),
        eval_set=catboost.Pool(vx, vy, weight=1 + np.abs(vy)),
        use_best_model=True,
    )
    tx, _ = load_rows(dataset, "test")
    np.testing.assert_allclose(model.predict(dataset), library_model.predict(tx), atol=1e-5)
    assert model.booster.tree_count_ == library_model.tree_count_ < 300
    check_history(recorder, model, "RMSE")
    importance = model.get_feature_importance()
    assert importance.index[0] == "F0"  # the signal
    assert importance.sum() == pytest.approx(100)


@pytest.mark.parametrize(
    ("library", "cls", "settings", "metric"),
    [
        ("xgboost", XGBModel, XGBOOST, "rmse"),
        ("catboost", CatBoostModel, {"task_type": "CPU", **CATBOOST}, "RMSE"),
        ("lightgbm", LGBModel, {"num_leaves": 4, "min_data_in_leaf": 5}, None),
    ],
)
def test_fit_takes_qlibs_arguments_and_returns_its_form_of_results(
    library, cls, settings, metric, dataset, caplog
):
    pytest.importorskip(library)
    caplog.set_level("INFO", "qtorch")
    model = cls(num_boost_round=300, **settings)
    evals_result = {"mine": 1}
    model.fit(
        dataset,
        num_boost_round=4,
        early_stopping_rounds=0,
        verbose_eval=2,
        evals_result=evals_result,
    )
    curves = model.evals_result_
    if metric is None:
        assert evals_result == {"mine": 1, **curves}
        metric = "l2"
    else:
        expected = {name: list(curves[name][metric]) for name in ("train", "valid")}
        assert evals_result == {"mine": 1, **expected}
    assert [len(curves[name][metric]) for name in ("train", "valid")] == [4, 4]
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("round ")]
    assert [line.partition(":")[0] for line in lines] == ["round 1", "round 3"]
    last = f"valid/{metric} {curves['valid'][metric][3]:.6g}"
    assert last in lines[1]
    assert "train/" in lines[1]
    caplog.clear()
    model.finetune(dataset, num_boost_round=2, verbose_eval=True)
    assert sum(r.getMessage().startswith("round ") for r in caplog.records) == 2
    caplog.clear()
    model.fit(dataset, num_boost_round=40, early_stopping_rounds=1)
    assert len(model.evals_result_["valid"][metric]) < 40
    assert not [r for r in caplog.records if r.getMessage().startswith("round ")]


@pytest.mark.parametrize(
    ("library", "make"),
    [
        ("xgboost", lambda rounds: XGBModel(0, rounds, base_score=0.0, **XGBOOST)),
        (
            "catboost",
            lambda rounds: CatBoostModel(
                early_stopping_rounds=0, num_boost_round=rounds, boost_from_average=False,
                bootstrap_type="No", random_strength=0, **CATBOOST,
            ),
        ),
    ],
)  # fmt: skip
def test_finetune_continues_boosting(library, make, dataset, tmp_path):
    pytest.importorskip(library)
    model = make(5)
    assert isinstance(model, ModelFT)
    with pytest.raises(NotFittedError):
        model.finetune(dataset)
    model.fit(dataset)
    before = model.predict(dataset)
    model = read_object(write_object(model, tmp_path, "params.pkl"), "params.pkl")
    pd.testing.assert_series_equal(model.predict(dataset), before)
    model.finetune(dataset, num_boost_round=3)
    reference = make(8)
    reference.fit(dataset)
    np.testing.assert_allclose(model.predict(dataset), reference.predict(dataset), atol=1e-4)
    assert not np.allclose(model.predict(dataset), before, atol=1e-3)


@pytest.mark.parametrize(
    ("library", "make"),
    [
        ("xgboost", lambda: XGBModel(num_boost_round=5, subsample=0.5, nthread=1)),
        ("catboost", lambda: CatBoostModel(num_boost_round=5, subsample=0.5, thread_count=1)),
    ],
)
def test_seed_is_that_of_the_session(library, make, dataset):
    pytest.importorskip(library)

    def scores(seed: int) -> pd.Series:
        model = make()
        with session_context(seed=seed):
            model.fit(dataset)
        return model.predict(dataset)

    pd.testing.assert_series_equal(scores(1), scores(1))
    assert not scores(1).equals(scores(2))


def test_wrong_arguments_of_xgboost_raise_at_construction(monkeypatch):
    pytest.importorskip("xgboost")
    XGBModel(eval_metric="mae", reg_lambda=2, alpha=1, objective="reg:quantileerror",
             quantile_alpha=0.3, random_state=1, n_jobs=1, device="cuda")  # fmt: skip
    with pytest.raises(ArgumentError, match="Did you mean 'max_depth'"):
        XGBModel(max_deph=3)
    with pytest.raises(ArgumentError, match="use num_boost_round instead of n_estimators"):
        XGBModel(n_estimators=3)
    with pytest.raises(ConfigError, match=r"objective='multi:softmax'.*one score"):
        XGBModel(objective="multi:softmax", num_class=3)
    with pytest.raises(ConfigError, match=r"Unknown objective function: `reg:squared`"):
        XGBModel(objective="reg:squared")
    with pytest.raises(ConfigError, match="use LinearModel"):
        XGBModel(booster="gblinear")
    monkeypatch.setitem(sys.modules, "xgboost", None)
    with pytest.raises(ConfigError, match=r"XGBModel needs XGBoost: pip install .*xgboost"):
        XGBModel()


def test_wrong_arguments_of_catboost_raise_at_construction(monkeypatch):
    pytest.importorskip("catboost")
    with pytest.raises(ArgumentError, match="Did you mean 'learning_rate'"):
        CatBoostModel(learning_rat=0.1)
    with pytest.raises(ArgumentError, match="use num_boost_round instead of iterations"):
        CatBoostModel(iterations=3)
    with pytest.raises(ConfigError, match="Did you mean 'RMSE'"):
        CatBoostModel(loss="RMS")
    monkeypatch.setitem(sys.modules, "catboost", None)
    with pytest.raises(ConfigError, match=r"CatBoostModel needs CatBoost: pip install .*catboost"):
        CatBoostModel()


@pytest.mark.parametrize(
    ("library", "make", "parameters", "message"),
    [
        ("lightgbm", LGBModel, {"learning_rate": "fast"}, "learning_rate of LGBModel is 'fast'"),
        ("lightgbm", LGBModel, {"num_leaves": 2.5}, "should be of type int"),
        ("lightgbm", LGBModel, {"subsample": 3}, "bagging_fraction of LGBModel is 3"),
        ("lightgbm", LGBModel, {"boosting": "gbdtt"}, "Unknown boosting type"),
        ("lightgbm", DEnsembleModel, {"max_depth": "deep"}, "max_depth of DEnsembleModel"),
        ("lightgbm", DEnsembleModel, {"num_models": "six"}, "num_models .* whole number"),
        ("lightgbm", LGBModel, {"num_boost_round": 1.5}, "num_boost_round .* whole number"),
        ("xgboost", XGBModel, {"eta": "fast"}, "eta of XGBModel is 'fast'"),
        ("xgboost", XGBModel, {"max_depth": "deep"}, "max_depth of XGBModel"),
        ("xgboost", XGBModel, {"early_stopping_rounds": -1}, "at least 0"),
        ("catboost", CatBoostModel, {"learning_rate": "fast"}, "learning_rate.*fast"),
        ("catboost", CatBoostModel, {"depth": 100}, "Maximum tree depth is 16"),
        ("catboost", CatBoostModel, {"grow_policy": "tall"}, "grow_policy .* 'Depthwise'"),
        ("catboost", CatBoostModel, {"loss": "Quantile:alpha=7"}, "alpha"),
    ],
)
def test_values_that_a_library_refuses_raise_at_construction(library, make, parameters, message):
    pytest.importorskip(library)
    with pytest.raises(ConfigError, match=message):
        make(**parameters)


def test_values_that_depend_on_data_and_device_are_left_to_the_training():
    pytest.importorskip("lightgbm")
    pytest.importorskip("catboost")
    constraints = [1, 0, -1, 0, 1]
    LGBModel(monotone_constraints=constraints, device_type="gpu", interaction_constraints=[[0, 4]])
    CatBoostModel(task_type="CPU", monotone_constraints=constraints, verbose=True)
    CatBoostModel(loss="Logloss", eval_metric="AUC", task_type="CPU")


def test_catboost_replaces_the_poisson_bootstrap_on_the_cpu(dataset, caplog):
    pytest.importorskip("catboost")
    small = {"num_boost_round": 5, "subsample": 0.8, "task_type": "CPU", **CATBOOST}
    model = CatBoostModel(bootstrap_type="Poisson", **small)
    model.fit(dataset)
    assert "bootstrap_type=Poisson needs a GPU" in caplog.text
    other_model = CatBoostModel(bootstrap_type="Bernoulli", **small)
    other_model.fit(dataset)
    pd.testing.assert_series_equal(model.predict(dataset), other_model.predict(dataset))


def test_missing_values_on_the_test_segment_are_scored(dataset):
    pytest.importorskip("xgboost")
    pytest.importorskip("catboost")
    holes = ToyDataset()
    group = holes.view.groups["feature"]
    column = group.column("F0").clone()
    column[-10:] = float("nan")
    holes.view = holes.view.with_group("feature", group.with_columns({"F0": column}))
    for model in (XGBModel(num_boost_round=5, **XGBOOST),
                  CatBoostModel(num_boost_round=5, **CATBOOST)):  # fmt: skip
        model.fit(dataset)
        assert model.predict(holes).notna().all()


def test_each_training_of_a_run_has_its_own_curves(dataset, tmp_path):
    pytest.importorskip("xgboost")
    recorder = ToyRecorder(tmp_path)
    model = XGBModel(0, 4, **XGBOOST)
    model.fit(dataset, recorder=recorder)
    model.fit(dataset, recorder=recorder)  # the same training
    curves = {"valid/rmse": model.evals_result_["valid"]["rmse"]}
    model.finetune(dataset, recorder=recorder, num_boost_round=2)
    curves["finetune/train/rmse"] = model.evals_result_["train"]["rmse"]
    other = XGBModel(0, 6, **{**XGBOOST, "eta": 0.1})
    other.fit(dataset, recorder=recorder)
    curves["fit_2/valid/rmse"] = other.evals_result_["valid"]["rmse"]
    history = recorder.history()  # raises if a step has two values
    for name, values in curves.items():
        assert [value for (key, _), value in history.items() if key == name] == values
    assert not any(name.startswith("fit_3") for name, _ in history)
