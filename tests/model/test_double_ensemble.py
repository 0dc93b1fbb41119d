"""DoubleEnsemble: weights of samples and choice of features against cases worked by hand."""

from __future__ import annotations

import lightgbm
import numpy as np
import pandas as pd
import pytest
from toy_training import ToyDataset, ToyRecorder

from qtorch.core.errors import ArgumentError, ConfigError, NotFittedError
from qtorch.data import Reweighter
from qtorch.metrics import calc_ic
from qtorch.model import DEnsembleModel, LGBModel
from qtorch.model.tabular.base import Rows

SMALL = {"num_leaves": 7, "min_data_in_leaf": 5, "num_threads": 1, "learning_rate": 0.2, "seed": 3}


def load_rows(dataset: ToyDataset, segment: str) -> tuple[np.ndarray, np.ndarray]:
    """Return features and label through the DataFrame view of the samples."""
    frame = dataset.samples(segment, data_key="learn").frame(("feature", "label"))
    return frame["feature"].to_numpy(np.float32), frame["label"].to_numpy(np.float32)[:, 0]


@pytest.fixture(scope="module")
def model() -> DEnsembleModel:
    features = {"bins_fs": 1, "sample_ratios": [0.5]}
    weights = {"decay": 0.5, "sub_weights": [1, 0.5, 0.25]}
    model = DEnsembleModel(num_models=3, epochs=20, **features, **weights, **SMALL)
    model.fit(ToyDataset())
    return model


def test_one_model_is_lightgbm(dataset):
    ensemble = DEnsembleModel(num_models=1, epochs=20, **SMALL)
    ensemble.fit(dataset)
    trees = LGBModel(num_boost_round=20, early_stopping_rounds=0, **SMALL)
    trees.fit(dataset)
    pd.testing.assert_series_equal(ensemble.predict(dataset), trees.predict(dataset))
    assert ensemble.evals_result_["model1/valid"] == trees.evals_result_["valid"]


def test_score_is_the_weighted_mean_of_models_on_their_own_features(dataset, model):
    x, _ = load_rows(dataset, "test")
    names = ["F0", "F1", "F2", "F3"]
    total = sum(
        weight * booster.predict(x[:, [names.index(name) for name in features]])
        for weight, booster, features in zip(
            [1, 0.5, 0.25], model.boosters, model.sub_features_, strict=True
        )
    )
    np.testing.assert_allclose(model.predict(dataset), total / 1.75, rtol=1e-5, atol=1e-6)
    assert model.sub_features_[0] == names
    assert all(features == sorted(features) for features in model.sub_features_)
    assert [len(features) for features in model.sub_features_] == [4, 2, 2]
    importance = model.get_feature_importance()
    first, second, third = (
        dict(zip(f, b.feature_importance(), strict=True))
        for f, b in zip(model.sub_features_, model.boosters, strict=True)
    )
    assert importance["F0"] == first["F0"] + 0.5 * second.get("F0", 0) + 0.25 * third.get("F0", 0)


def test_curves_and_report(dataset, tmp_path):
    recorder = ToyRecorder(tmp_path)
    model = DEnsembleModel(num_models=2, epochs=30, decay=0.5, early_stopping_rounds=3, **SMALL)
    model.fit(dataset, recorder=recorder)
    history = recorder.history()
    assert {n for n, _ in history} == {
        *("train/l2", "valid/l2"),
        *(f"model{k}/{segment}/l2" for k in (1, 2) for segment in ("train", "valid")),
    }
    _, y = load_rows(dataset, "valid")
    scores = model.predict(dataset, "valid")
    assert history["valid/l2", 1] == pytest.approx(((scores.to_numpy() - y) ** 2).mean(), rel=1e-5)
    report = model.fit_report_
    assert report["best_value"] == history["valid/l2", 1]
    curves = [model.evals_result_[f"model{k}/valid"]["l2"] for k in (1, 2)]
    assert report["epochs"] == sum(map(len, curves))
    for booster, curve in zip(model.boosters, curves, strict=True):
        assert booster.num_trees() == int(np.argmin(curve)) + 1
    raw = dataset.samples("test").frame(("raw_label",)).iloc[:, 0]
    assert calc_ic(model.predict(dataset), raw)[0].mean() > 0.4


def test_samples_are_weighed_by_their_losses():
    """Four samples, one tree a round: the h of each is worked by hand."""
    x = np.array([[0.0], [1.0], [2.0], [3.0]], dtype=np.float32)
    rows = Rows(x, np.array([0.0, 4.0, 0.0, 1.0], dtype=np.float32), None, ("F",))
    data = lightgbm.Dataset(x, rows.y)
    trees = {"min_data_in_leaf": 1, "min_data_in_bin": 1, "num_leaves": 4, "verbosity": -1}
    booster = lightgbm.train({**trees, "learning_rate": 0.5}, data, 2)
    model = DEnsembleModel(num_models=2, bins_sr=2, alpha1=1.0, alpha2=0.5, decay=0.5, **SMALL)
    model.feature_names_, model.sub_features_ = ("F",), [["F"]]
    model.contents_ = [booster.model_to_string().encode()]
    start = (rows.y - booster.predict(x, num_iteration=1)) ** 2
    end = (rows.y - booster.predict(x)) ** 2
    # The mean is 1.25, and a leaf holds one sample: each round halves the distance to its label.
    np.testing.assert_allclose(start, (np.array([1.25, 2.75, 1.25, 0.25]) / 2) ** 2, rtol=1e-5)
    np.testing.assert_allclose(end, start / 4, rtol=1e-5)
    # Losses rank 2.5, 4, 2.5, 1 of 4 before and after: end / start is 1 for all, rank 2.5 of 4.
    h = np.array([2.5, 1.0, 2.5, 4.0]) / 4 + 0.5 * 2.5 / 4
    low, high = h[[0, 1, 2]].mean(), h[3]  # two bins of equal width, from h = 0.5625 to 1.3125
    expected = 1 / (0.5 * np.array([low, low, low, high]) + 0.1)
    np.testing.assert_allclose(model._sample_weights(0, rows, end), expected, rtol=1e-6)


def test_features_that_raise_the_loss_are_drawn_most():
    random = np.random.default_rng(0)
    x = random.normal(size=(400, 10)).astype(np.float32)
    rows = Rows(x, (2 * x[:, 0] + x[:, 1]).astype(np.float32), None, tuple("ABCDEFGHIJ"))
    model = DEnsembleModel(num_models=2, epochs=20, bins_fs=2, sample_ratios=[1.0, 0.5], **SMALL)
    model.feature_names_ = rows.names
    model._train_model(rows, None, np.arange(10), np.ones(400))
    scores = model._score(x)
    losses = (rows.y - scores) ** 2
    importance = model._shuffle_importance(rows, scores, losses, np.random.RandomState(0))
    assert importance[:2].min() > 2 * np.abs(importance[2:]).max()
    features = model._draw_features(rows, scores, losses, np.random.RandomState(0))
    assert 0 in features  # all of the highest bin, half of the lowest
    assert len(features) < 10
    assert (np.diff(features) > 0).all()


def test_weights_of_a_reweighter_multiply_those_of_the_samples(dataset):
    class LargeLabels(Reweighter):
        def reweight(self, data: pd.DataFrame) -> pd.Series:
            return data["label"].iloc[:, 0].abs()

    trees = LGBModel(num_boost_round=10, early_stopping_rounds=0, **SMALL)
    trees.fit(dataset, LargeLabels())
    settings = {"num_models": 2, "epochs": 10, "enable_fs": False, **SMALL}
    equal = DEnsembleModel(enable_sr=False, **settings)
    equal.fit(dataset, LargeLabels())
    np.testing.assert_allclose(equal.predict(dataset), trees.predict(dataset), atol=1e-6)
    model = DEnsembleModel(decay=0.5, **settings)
    model.fit(dataset, LargeLabels())
    x, _ = load_rows(dataset, "test")
    first, second = (booster.predict(x) for booster in model.boosters)
    np.testing.assert_allclose(first, trees.predict(dataset), rtol=1e-5, atol=1e-6)
    assert not np.allclose(first, second, atol=1e-2)


def test_wrong_arguments_raise_at_construction():
    with pytest.raises(ConfigError, match=r"sub_weights=\[1, 2\] has 2 values.*num_models is 6"):
        DEnsembleModel(sub_weights=[1, 2])
    with pytest.raises(ConfigError, match=r"sample_ratios=.* has 5 values.*bins_fs is 3"):
        DEnsembleModel(bins_fs=3)
    with pytest.raises(ConfigError, match="base_model"):
        DEnsembleModel(base_model="mlp")
    with pytest.raises(ArgumentError, match="use epochs instead of num_boost_round"):
        DEnsembleModel(num_boost_round=3)
    with pytest.raises(ArgumentError, match="Did you mean 'num_leaves'"):
        DEnsembleModel(num_leafs=3)
    with pytest.raises(NotFittedError):
        DEnsembleModel().predict(ToyDataset())
