"""Models of rows: linear and LightGBM against their libraries, and what all of them have alike."""

from __future__ import annotations

import sys
from collections.abc import Callable

import lightgbm
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import Lasso, LinearRegression, Ridge
from toy_training import ToyDataset, ToyRecorder

from qtorch.core.errors import ArgumentError, ConfigError, DataError, NotFittedError
from qtorch.core.session import session_context
from qtorch.data import Reweighter
from qtorch.metrics import calc_ic
from qtorch.model import (
    CatBoostModel,
    DEnsembleModel,
    LGBModel,
    LinearModel,
    Model,
    ModelFT,
    XGBModel,
)
from qtorch.tracking.artifacts import read_object, write_object

SMALL = {"num_leaves": 7, "min_data_in_leaf": 5, "num_threads": 1, "learning_rate": 0.2}
MODELS = {
    "linear": lambda: LinearModel(),
    "lightgbm": lambda: LGBModel(num_boost_round=20, **SMALL),
    "xgboost": lambda: XGBModel(num_boost_round=20, max_depth=3, nthread=1),
    "catboost": lambda: CatBoostModel(num_boost_round=20, depth=3, thread_count=1),
    "double ensemble": lambda: DEnsembleModel(num_models=2, epochs=20, decay=0.5, **SMALL),
}


@pytest.fixture(params=MODELS)
def make(request: pytest.FixtureRequest) -> Callable[[], Model]:
    """A function that makes a small model."""
    if request.param in ("xgboost", "catboost"):
        pytest.importorskip(request.param)
    return MODELS[request.param]


class LabelReweighter(Reweighter):
    """Give larger labels more weight."""

    def reweight(self, data: pd.DataFrame) -> pd.Series:
        return 1 + data["label"].iloc[:, 0].abs()


def load_rows(dataset: ToyDataset, segment: str) -> tuple[np.ndarray, np.ndarray]:
    """Return features and label through the DataFrame view of the samples."""
    frame = dataset.samples(segment, data_key="learn").frame(("feature", "label"))
    return frame["feature"].to_numpy(np.float64), frame["label"].to_numpy(np.float64)[:, 0]


def test_windows_are_reduced_to_their_last_step_and_each_sample_is_scored_once(make):
    windows, days = ToyDataset(step_len=3), ToyDataset(step_len=1)
    first, second = make(), make()
    first.fit(windows)
    second.fit(days)
    scores = first.predict(windows)
    pd.testing.assert_series_equal(scores, second.predict(days))
    assert isinstance(first, Model)
    assert (scores.name, scores.dtype) == ("score", np.float32)
    assert scores.index.equals(windows.samples("test").index)
    raw = windows.samples("test").frame(("raw_label",)).iloc[:, 0]
    assert calc_ic(scores, raw)[0].mean() > 0.4
    start, end = windows.segments["test"]
    pd.testing.assert_series_equal(first.predict(windows, slice(start, end)), scores)


def test_save_and_load_without_pickle(make, dataset, tmp_path):
    model = make()
    model.fit(dataset)
    path = write_object(model, tmp_path, "params.pkl")
    assert path.suffix == ".safetensors"
    restored_model = read_object(path, "params.pkl")
    pd.testing.assert_series_equal(restored_model.predict(dataset), model.predict(dataset))
    assert restored_model.fit_report_ == model.fit_report_
    assert restored_model.fit_report_["samples"] == len(dataset.samples("train", data_key="learn"))
    assert restored_model.to_config() == model.to_config()
    unfitted_model = read_object(write_object(make(), tmp_path, "new.pkl"), "new.pkl")
    with pytest.raises(NotFittedError, match="call fit"):
        unfitted_model.predict(dataset)
    model.to_pickle(tmp_path / "model.pickle")
    unpickled_model = type(model).load(tmp_path / "model.pickle", trusted_pickle=True)
    pd.testing.assert_series_equal(unpickled_model.predict(dataset), model.predict(dataset))


def test_features_are_matched_by_name(make, dataset):
    model = make()
    model.fit(dataset)
    expected = model.predict(dataset)
    other_dataset = ToyDataset()
    group = other_dataset.view.groups["feature"]
    other_dataset.view = other_dataset.view.with_group("feature", group.keep(group.names[::-1]))
    pd.testing.assert_series_equal(model.predict(other_dataset), expected)
    other_dataset.view = other_dataset.view.with_group("feature", group.keep(group.names[:2]))
    with pytest.raises(DataError, match="F2, F3"):
        model.predict(other_dataset)


def test_linear_estimators_match_scikit_learn(dataset):
    x, y = load_rows(dataset, "train")
    weight = (1 + np.abs(y)).astype(np.float32)
    for intercept in (False, True):
        cases = {
            "ols": (0.0, LinearRegression(fit_intercept=intercept)),
            "ridge": (50.0, Ridge(50.0, fit_intercept=intercept)),
            "lasso": (0.1, Lasso(0.1, fit_intercept=intercept, tol=1e-10)),
            "nnls": (0.0, LinearRegression(fit_intercept=intercept, positive=True)),
        }
        for name, (alpha, sklearn_model) in cases.items():
            for reweighter, weights in ((None, None), (LabelReweighter(), weight)):
                model = LinearModel(name, alpha, fit_intercept=intercept)
                model.fit(dataset, reweighter)
                sklearn_model.fit(x, y, sample_weight=weights)
                np.testing.assert_allclose(model.coef_, sklearn_model.coef_, rtol=1e-4, atol=1e-6)
                assert model.intercept_ == pytest.approx(sklearn_model.intercept_, abs=1e-6)


def test_linear_model_includes_valid_and_skips_incomplete_rows():
    dataset = ToyDataset()
    (x, y), (vx, vy) = (load_rows(dataset, s) for s in ("train", "valid"))
    x, y = np.concatenate((x, vx)), np.concatenate((y, vy))
    model = LinearModel(include_valid=True)
    model.fit(dataset)
    np.testing.assert_allclose(model.coef_, np.linalg.lstsq(x, y)[0], rtol=1e-5)
    group = dataset.view.groups["feature"]
    column = group.column("F0").clone()
    column[:10] = float("nan")
    dataset.view = dataset.view.with_group("feature", group.with_columns({"F0": column}))
    x, y = load_rows(dataset, "train")
    is_complete = ~np.isnan(x).any(1)
    model = LinearModel()
    model.fit(dataset)
    np.testing.assert_allclose(
        model.coef_, np.linalg.lstsq(x[is_complete], y[is_complete])[0], rtol=1e-5
    )
    assert model.predict(dataset, "train").isna().to_numpy()[0]


def test_ols_takes_the_minimum_norm_solution():
    dataset = ToyDataset()
    group = dataset.view.groups["feature"]
    new_group = group.with_columns({"F1": group.column("F0").clone()})
    dataset.view = dataset.view.with_group("feature", new_group)
    model = LinearModel()
    model.fit(dataset)
    assert model.coef_[0] == pytest.approx(model.coef_[1], rel=1e-6)


def test_lgb_model_matches_lightgbm_on_the_same_rows(dataset, tmp_path):
    recorder = ToyRecorder(tmp_path)
    model = LGBModel(early_stopping_rounds=5, num_boost_round=300, seed=3, **SMALL)
    model.fit(dataset, LabelReweighter(), recorder=recorder)
    (x, y), (vx, vy) = (load_rows(dataset, s) for s in ("train", "valid"))
    train = lightgbm.Dataset(x, y, weight=1 + np.abs(y))
    valid = lightgbm.Dataset(vx, vy, weight=1 + np.abs(vy), reference=train)
    defaults = {"deterministic": True, "force_col_wise": True, "verbosity": -1, "seed": 3}
    evaluations: dict = {}
    booster = lightgbm.train(
        {"objective": "mse", **defaults, **SMALL},
        train,
        300,
        valid_sets=[valid],
        callbacks=[
            lightgbm.early_stopping(5, verbose=False),
            lightgbm.record_evaluation(evaluations),
        ],
    )
    tx, _ = load_rows(dataset, "test")
    np.testing.assert_allclose(model.predict(dataset), booster.predict(tx), rtol=1e-4, atol=1e-5)
    assert model.booster.num_trees() == booster.best_iteration < 300
    assert model.fit_report_["best_epoch"] == booster.best_iteration - 1
    np.testing.assert_allclose(
        model.evals_result_["valid"]["l2"], evaluations["valid_0"]["l2"], rtol=1e-5
    )
    history = recorder.history()
    assert history["valid/l2", 0] == model.evals_result_["valid"]["l2"][0]
    assert {name for name, _ in history} == {"train/l2", "valid/l2"}
    assert set(model.get_feature_importance().index) == {"F0", "F1", "F2", "F3"}


def test_lgb_finetune_continues_boosting(dataset, tmp_path):
    model = LGBModel(num_boost_round=5, early_stopping_rounds=0, **SMALL)
    assert isinstance(model, ModelFT)
    with pytest.raises(NotFittedError):
        model.finetune(dataset)
    model.fit(dataset)
    model = read_object(write_object(model, tmp_path, "params.pkl"), "params.pkl")
    model.finetune(dataset, num_boost_round=3)
    reference = LGBModel(num_boost_round=8, early_stopping_rounds=0, **SMALL)
    reference.fit(dataset)
    assert model.booster.num_trees() == 8
    np.testing.assert_allclose(
        model.predict(dataset), reference.predict(dataset), rtol=1e-4, atol=1e-5
    )


def test_lgb_model_uses_the_session_seed(dataset):
    def scores(seed: int) -> pd.Series:
        model = LGBModel(num_boost_round=5, subsample=0.5, bagging_freq=1, **SMALL)
        with session_context(seed=seed):
            model.fit(dataset)
        return model.predict(dataset)

    pd.testing.assert_series_equal(scores(1), scores(1))
    assert not scores(1).equals(scores(2))


def test_invalid_arguments_raise_at_construction(monkeypatch):
    with pytest.raises(ArgumentError, match="Did you mean 'num_leaves'"):
        LGBModel(num_leafs=3)
    with pytest.raises(ArgumentError, match="use num_boost_round instead of n_estimators"):
        LGBModel(n_estimators=3)
    with pytest.raises(ArgumentError, match="bagging_fraction"):
        LGBModel(subsample=0.5, bagging_fraction=0.6)
    with pytest.raises(ConfigError, match="Did you mean 'mse'"):
        LGBModel(loss="mes")
    with pytest.raises(ConfigError, match="Did you mean 'ridge'"):
        LinearModel("rigde")
    with pytest.raises(ConfigError, match="only ridge and lasso"):
        LinearModel("ols", alpha=1.0)
    with pytest.raises(ConfigError, match="alpha is 'small'; expected a number"):
        LinearModel("ridge", alpha="small")
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(ConfigError, match=r"pip install 'lightgbm>="):
        LGBModel()
