"""Baselines on plain rows: LightGBM and linear models, beside the libraries' own arithmetic."""

from __future__ import annotations

import sys

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
from qtorch.model import LGBModel, LinearModel, Model, ModelFT
from qtorch.tracking.artifacts import read_object, write_object

SMALL = {"num_leaves": 7, "min_data_in_leaf": 5, "num_threads": 1, "learning_rate": 0.2}
MODELS = (lambda: LinearModel(), lambda: LGBModel(num_boost_round=20, **SMALL))
every = pytest.mark.parametrize("make", MODELS, ids=["linear", "lightgbm"])


class ByColumn(Reweighter):
    """More weight to larger labels."""

    def reweight(self, data: pd.DataFrame) -> pd.Series:
        return 1 + data["label"].iloc[:, 0].abs()


def rows_of(dataset: ToyDataset, segment: str) -> tuple[np.ndarray, np.ndarray]:
    """Features and label by the way that frames for people take."""
    frame = dataset.samples(segment, data_key="learn").frame(("feature", "label"))
    return frame["feature"].to_numpy(np.float64), frame["label"].to_numpy(np.float64)[:, 0]


@every
def test_a_window_is_seen_by_its_last_step_and_each_sample_scored_once(make):
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


@every
def test_saved_without_pickle_and_loaded_again(make, dataset, tmp_path):
    model = make()
    model.fit(dataset)
    path = write_object(model, tmp_path, "params.pkl")
    assert path.suffix == ".safetensors"
    again = read_object(path, "params.pkl")
    pd.testing.assert_series_equal(again.predict(dataset), model.predict(dataset))
    assert again.fit_report_ == model.fit_report_
    assert again.fit_report_["samples"] == len(dataset.samples("train", data_key="learn"))
    assert again.to_config() == model.to_config()
    unfitted = read_object(write_object(make(), tmp_path, "new.pkl"), "new.pkl")
    with pytest.raises(NotFittedError, match="call fit"):
        unfitted.predict(dataset)
    model.to_pickle(tmp_path / "model.pickle")
    loaded = type(model).load(tmp_path / "model.pickle")
    pd.testing.assert_series_equal(loaded.predict(dataset), model.predict(dataset))


@every
def test_features_are_matched_by_name(make, dataset):
    model = make()
    model.fit(dataset)
    expected = model.predict(dataset)
    other = ToyDataset()
    group = other.view.groups["feature"]
    other.view = other.view.with_group("feature", group.keep(group.names[::-1]))
    pd.testing.assert_series_equal(model.predict(other), expected)
    other.view = other.view.with_group("feature", group.keep(group.names[:2]))
    with pytest.raises(DataError, match="F2, F3"):
        model.predict(other)


def test_linear_estimators_are_those_of_scikit_learn(dataset):
    x, y = rows_of(dataset, "train")
    weight = (1 + np.abs(y)).astype(np.float32)
    for intercept in (False, True):
        cases = {
            "ols": (0.0, LinearRegression(fit_intercept=intercept)),
            "ridge": (50.0, Ridge(50.0, fit_intercept=intercept)),
            "lasso": (0.1, Lasso(0.1, fit_intercept=intercept, tol=1e-10)),
            "nnls": (0.0, LinearRegression(fit_intercept=intercept, positive=True)),
        }
        for name, (alpha, theirs) in cases.items():
            for reweighter, weights in ((None, None), (ByColumn(), weight)):
                ours = LinearModel(name, alpha, fit_intercept=intercept)
                ours.fit(dataset, reweighter)
                theirs.fit(x, y, sample_weight=weights)
                np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-4, atol=1e-6)
                assert ours.intercept_ == pytest.approx(theirs.intercept_, abs=1e-6)


def test_linear_learns_from_valid_too_if_asked_and_leaves_incomplete_rows_out():
    dataset = ToyDataset()
    (x, y), (vx, vy) = (rows_of(dataset, s) for s in ("train", "valid"))
    x, y = np.concatenate((x, vx)), np.concatenate((y, vy))
    ours = LinearModel(include_valid=True)
    ours.fit(dataset)
    np.testing.assert_allclose(ours.coef_, np.linalg.lstsq(x, y)[0], rtol=1e-5)
    group = dataset.view.groups["feature"]
    holed = group.column("F0").clone()
    holed[:10] = float("nan")
    dataset.view = dataset.view.with_group("feature", group.with_columns({"F0": holed}))
    x, y = rows_of(dataset, "train")
    known = ~np.isnan(x).any(1)
    ours = LinearModel()
    ours.fit(dataset)
    np.testing.assert_allclose(ours.coef_, np.linalg.lstsq(x[known], y[known])[0], rtol=1e-5)
    assert ours.predict(dataset, "train").isna().to_numpy()[0]


def test_of_linearly_dependent_columns_the_shortest_solution_is_taken():
    dataset = ToyDataset()
    group = dataset.view.groups["feature"]
    twice = group.with_columns({"F1": group.column("F0").clone()})
    dataset.view = dataset.view.with_group("feature", twice)
    ours = LinearModel()
    ours.fit(dataset)
    assert ours.coef_[0] == pytest.approx(ours.coef_[1], rel=1e-6)


def test_lightgbm_is_its_own_library_on_the_same_rows(dataset, tmp_path):
    recorder = ToyRecorder(tmp_path)
    ours = LGBModel(early_stopping_rounds=5, num_boost_round=300, seed=3, **SMALL)
    ours.fit(dataset, ByColumn(), recorder=recorder)
    (x, y), (vx, vy) = (rows_of(dataset, s) for s in ("train", "valid"))
    train = lightgbm.Dataset(x, y, weight=1 + np.abs(y))
    valid = lightgbm.Dataset(vx, vy, weight=1 + np.abs(vy), reference=train)
    fixed = {"deterministic": True, "force_col_wise": True, "verbosity": -1, "seed": 3}
    found: dict = {}
    theirs = lightgbm.train(
        {"objective": "mse", **fixed, **SMALL},
        train,
        300,
        valid_sets=[valid],
        callbacks=[lightgbm.early_stopping(5, verbose=False), lightgbm.record_evaluation(found)],
    )
    tx, _ = rows_of(dataset, "test")
    np.testing.assert_allclose(ours.predict(dataset), theirs.predict(tx), rtol=1e-4, atol=1e-5)
    assert ours.booster.num_trees() == theirs.best_iteration < 300
    assert ours.fit_report_["best_epoch"] == theirs.best_iteration - 1
    np.testing.assert_allclose(ours.evals_result_["valid"]["l2"], found["valid_0"]["l2"], rtol=1e-5)
    history = recorder.history()
    assert history["valid/l2", 0] == ours.evals_result_["valid"]["l2"][0]
    assert {name for name, _ in history} == {"train/l2", "valid/l2"}
    assert set(ours.get_feature_importance().index) == {"F0", "F1", "F2", "F3"}


def test_lightgbm_boosts_on_where_it_was(dataset, tmp_path):
    model = LGBModel(num_boost_round=5, early_stopping_rounds=0, **SMALL)
    assert isinstance(model, ModelFT)
    with pytest.raises(NotFittedError):
        model.finetune(dataset)
    model.fit(dataset)
    model = read_object(write_object(model, tmp_path, "params.pkl"), "params.pkl")
    model.finetune(dataset, num_boost_round=3)
    whole = LGBModel(num_boost_round=8, early_stopping_rounds=0, **SMALL)
    whole.fit(dataset)
    assert model.booster.num_trees() == 8
    np.testing.assert_allclose(model.predict(dataset), whole.predict(dataset), rtol=1e-4, atol=1e-5)


def test_the_session_seeds_what_is_drawn(dataset):
    def scores(seed: int) -> pd.Series:
        model = LGBModel(num_boost_round=5, subsample=0.5, bagging_freq=1, **SMALL)
        with session_context(seed=seed):
            model.fit(dataset)
        return model.predict(dataset)

    pd.testing.assert_series_equal(scores(1), scores(1))
    assert not scores(1).equals(scores(2))


def test_what_cannot_be_meant_is_said_at_once(monkeypatch):
    with pytest.raises(ArgumentError, match="Did you mean 'num_leaves'"):
        LGBModel(num_leafs=3)
    with pytest.raises(ArgumentError, match="given as num_boost_round"):
        LGBModel(n_estimators=3)
    with pytest.raises(ArgumentError, match="bagging_fraction"):
        LGBModel(subsample=0.5, bagging_fraction=0.6)
    with pytest.raises(ConfigError, match="Did you mean 'mse'"):
        LGBModel(loss="mes")
    with pytest.raises(ConfigError, match="Did you mean 'ridge'"):
        LinearModel("rigde")
    with pytest.raises(ConfigError, match="ridge and lasso alone"):
        LinearModel("ols", alpha=1.0)
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(ConfigError, match=r"pip install 'qtorch\[lightgbm\]'"):
        LGBModel()
