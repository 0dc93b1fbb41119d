"""Qlib's models of boosted trees on rows of a file; runs in an interpreter with pyqlib.

    PYTHON qlib_tree_models.py JOB.json FOLDER

JOB: `frame` (a Parquet file, columns by group and name), `segments`, and `cases`: class, arguments
of the constructor and of `fit`, and the seed of numpy. Writes FOLDER/K.parquet with the scores of
the test segment for each case, and for XGBoost also those of its best round.

DoubleEnsemble fails with pandas 2 and later, which builds no index from a set; it is repaired here:
the features that were drawn are sorted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import qlib.contrib.model.double_ensemble as double_ensemble
from qlib.data.dataset import DatasetH
from qlib.data.dataset.handler import DataHandlerLP
from qlib.utils import init_instance_by_config


class SortedIndex:
    """pandas, whose Index sorts what is given to it as a set."""

    def __getattr__(self, name: str) -> Any:
        return getattr(pd, name)

    @staticmethod
    def Index(values: Any) -> pd.Index:
        return pd.Index(sorted(values) if isinstance(values, set) else values)


def main(job_path: str, folder: str) -> None:
    job = json.loads(Path(job_path).read_text())
    double_ensemble.pd = SortedIndex()
    handler = DataHandlerLP.from_df(pd.read_parquet(job["frame"]))
    dataset = DatasetH(handler, {name: tuple(dates) for name, dates in job["segments"].items()})
    for k, case in enumerate(job["cases"]):
        np.random.seed(case["seed"])  # noqa: NPY002 - Qlib draws from this generator
        model = init_instance_by_config({"class": case["class"], "kwargs": case["kwargs"]})
        model.fit(dataset, **case["fit"])
        scores = {"score": model.predict(dataset)}
        if case["class"].endswith("XGBModel"):
            scores["best"] = predict_best_round(model, dataset)
        pd.DataFrame(scores).to_parquet(Path(folder) / f"{k}.parquet")


def predict_best_round(model: Any, dataset: DatasetH) -> pd.Series:
    """Return XGBoost's scores from the trees up to the best round."""
    import xgboost

    x = dataset.prepare("test", col_set="feature", data_key=DataHandlerLP.DK_I)
    stop = model.model.best_iteration + 1
    return pd.Series(model.model.predict(xgboost.DMatrix(x), iteration_range=(0, stop)), x.index)


if __name__ == "__main__":
    main(*sys.argv[1:])
