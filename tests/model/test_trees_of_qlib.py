"""XGBoost, CatBoost and DoubleEnsemble against real Qlib on the same rows and seed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from qtorch import init_instance_by_config
from qtorch.core.qlib.translation import translate_config
from qtorch.core.session import session_context
from qtorch.data import DataHandlerLP, DatasetH

pytestmark = pytest.mark.qlib

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "parity" / "qlib_tree_models.py"
SEGMENTS = {
    "train": ["2020-01-01", "2020-05-31"],
    "valid": ["2020-06-03", "2020-07-31"],
    "test": ["2020-08-03", "2020-09-30"],
}
LIGHTGBM = {
    "num_leaves": 15,
    "min_data_in_leaf": 20,
    "num_threads": 1,
    "learning_rate": 0.1,
    "deterministic": True,
    "force_col_wise": True,
    "verbosity": -1,
    "seed": 7,
}
ENSEMBLE = {"num_models": 3, "epochs": 20, "decay": 0.5, **LIGHTGBM}
XGBOOST = {"eta": 0.1, "max_depth": 4, "subsample": 0.8, "seed": 7, "nthread": 1}
CATBOOST = {"learning_rate": 0.1, "max_depth": 4, "random_seed": 7, "thread_count": 1}
ROUNDS = {"num_boost_round": 60, "early_stopping_rounds": 5}
FIXED = {"num_boost_round": 15, "early_stopping_rounds": 100}

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "XGBoost": ("xgboost.XGBModel", XGBOOST, FIXED),
    "XGBoost, stopped": ("xgboost.XGBModel", XGBOOST, ROUNDS),
    "CatBoost": ("catboost_model.CatBoostModel", CATBOOST, FIXED),
    "CatBoost, stopped": ("catboost_model.CatBoostModel", CATBOOST, ROUNDS),
    "DoubleEnsemble": ("double_ensemble.DEnsembleModel", ENSEMBLE, {}),
    "samples alone": ("double_ensemble.DEnsembleModel", {**ENSEMBLE, "enable_fs": False}, {}),
    "features alone": ("double_ensemble.DEnsembleModel", {**ENSEMBLE, "enable_sr": False}, {}),
}
LIBRARIES = {"XGBModel": "xgboost", "CatBoostModel": "catboost"}


def random_frame() -> pd.DataFrame:
    """Rows of a market of 30 instruments: ten features, of which three carry a signal."""
    random = np.random.default_rng(0)
    days = pd.bdate_range("2020-01-01", "2020-10-30", name="datetime")
    names = [f"S{k:02d}" for k in range(30)]
    index = pd.MultiIndex.from_product([days, pd.Index(names, name="instrument")])
    x = random.normal(size=(len(index), 10)).astype(np.float32)
    label = x[:, 0] - 0.5 * x[:, 1] * x[:, 2] + random.normal(size=len(index))
    columns = [*(("feature", f"F{k}") for k in range(10)), ("label", "LABEL0")]
    frame = pd.DataFrame(np.column_stack([x, label.astype(np.float32)]), index=index)
    frame.columns = pd.MultiIndex.from_tuples(columns)
    return frame


def has_module(python: str, name: str) -> bool:
    """Whether a Python interpreter can import a module."""
    return not subprocess.run([python, "-c", f"import {name}"], capture_output=True).returncode


@pytest.fixture(scope="module")
def qlib_scores(qlib_python: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that returns Qlib's scores of a case; it skips where the library is missing."""
    folder = tmp_path_factory.mktemp("trees")
    random_frame().to_parquet(folder / "frame.parquet")
    missing = {name for name in LIBRARIES.values() if not has_module(qlib_python, name)}
    cases = {
        name: case
        for name, case in CASES.items()
        if LIBRARIES.get(case[0].partition(".")[2]) not in missing
    }
    job = {
        "frame": str(folder / "frame.parquet"),
        "segments": SEGMENTS,
        "cases": [
            {"class": f"qlib.contrib.model.{title}", "kwargs": kwargs, "fit": fit, "seed": 7}
            for title, kwargs, fit in cases.values()
        ],
    }
    (folder / "job.json").write_text(json.dumps(job))
    command = [qlib_python, str(SCRIPT), str(folder / "job.json"), str(folder)]
    # CatBoost writes into the working folder.
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]

    def read(name: str) -> pd.DataFrame:
        if name not in cases:
            pytest.skip(f"the Python of QTORCH_QLIB_PYTHON has no {' and '.join(missing)}")
        return pd.read_parquet(folder / f"{list(cases).index(name)}.parquet")

    return read


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_qlib(name: str, qlib_scores: Any) -> None:
    title, kwargs, fit = CASES[name]
    if title.partition(".")[2] in LIBRARIES:
        pytest.importorskip(LIBRARIES[title.partition(".")[2]])
    expected = qlib_scores(name)
    handler = DataHandlerLP.from_df(random_frame())
    dataset = DatasetH(handler, SEGMENTS, allow_overlap=True)
    config = {"class": f"qlib.contrib.model.{title}", "kwargs": kwargs}
    model = init_instance_by_config(translate_config(config), **fit)
    with session_context(seed=7):
        model.fit(dataset)
    column = "best" if "best" in expected and "stopped" in name else "score"
    scores = model.predict(dataset)
    np.testing.assert_allclose(scores, expected[column].reindex(scores.index), rtol=1e-4, atol=1e-5)
    assert scores.std() > 0.1
