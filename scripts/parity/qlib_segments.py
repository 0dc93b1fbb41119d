"""Run Qlib's MultiSegRecord on a frame of scores and labels; needs a Python with pyqlib.

    python qlib_segments.py JOB.json

JOB: frame (a pickle with the columns (feature, SCORE) and (label, LABEL0)), segments of the
dataset, requests (names to segments, or to the first and last date of a slice), folder. Prints the
stored results as JSON: values by day and their means, by the names of the artifacts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import qlib


class StoredScores:
    """A model whose scores are the feature of the data."""

    def predict(self, dataset: Any, segment: Any) -> pd.Series:
        """Return the feature of a segment."""
        scores: pd.Series = dataset.prepare(segment, col_set="feature").iloc[:, 0]
        return scores


def main() -> None:
    """Generate the record and print what it has stored."""
    job = json.loads(Path(sys.argv[1]).read_text())
    store = {
        "class": "MLflowExpManager",
        "module_path": "qlib.workflow.expm",
        "kwargs": {"uri": f"sqlite:///{job['folder']}/qlib.db", "default_exp_name": "parity"},
    }
    qlib.init(provider_uri=job["folder"], region="us", exp_manager=store, logging_level=50)
    from qlib.contrib.workflow.record_temp import MultiSegRecord
    from qlib.data.dataset import DatasetH
    from qlib.data.dataset.handler import DataHandlerLP
    from qlib.data.dataset.loader import StaticDataLoader
    from qlib.workflow import R

    frame = pd.read_pickle(job["frame"])
    parts = {group: frame[group] for group in ("feature", "label")}
    dataset = DatasetH(DataHandlerLP(data_loader=StaticDataLoader(parts)), job["segments"])
    requests = {
        name: slice(*value) if isinstance(value, list) else value
        for name, value in job["requests"].items()
    }
    with R.start(experiment_name="parity"):
        recorder = R.get_recorder()
        MultiSegRecord(StoredScores(), dataset, recorder).generate(requests, save=True)
        stored = {n: recorder.load_object(f"results-{n}.pkl") for n in requests}
    for results in stored.values():
        for name, value in results.items():
            if isinstance(value, pd.Series):
                results[name] = {str(day.date()): float(x) for day, x in value.items()}
    print("RESULT" + json.dumps(stored))


if __name__ == "__main__":
    main()
