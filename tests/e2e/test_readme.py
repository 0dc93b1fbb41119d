"""Tests that the Python examples of the README run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from qtorch.data.source.synthetic import SyntheticSource
from qtorch.data.source.writer import write_qlib

README = Path(__file__).resolve().parents[2] / "README.md"


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


@pytest.mark.slow
def test_python_tour_runs(folder, monkeypatch, runs):
    monkeypatch.setenv("HOME", str(folder))
    market = SyntheticSource(8, "2007-10-01", "2017-12-08")
    data_folder = Path(write_qlib(market, folder / ".qlib/qlib_data/us_data"))
    shutil.copy(data_folder / "instruments/stocks.txt", data_folder / "instruments/sp500.txt")
    tour_code, later_code = python_blocks()[:2]
    names: dict = {}
    short_tour = tour_code.replace('"max_epochs": 10', '"max_epochs": 1')
    exec(short_tour.replace("topk=50, n_drop=5", "topk=4, n_drop=1"), names)
    (run,) = runs("workflow")
    assert run.status == "FINISHED"
    assert {"IC", "Rank IC", "1day.excess_return_with_cost.mean"} <= set(run.list_metrics())
    exec(later_code.replace("recorder_id=...", f"recorder_id={run.id!r}"), names)
    assert names["R"].get_recorder(recorder_id=run.id, experiment_name="workflow").id == run.id


def test_custom_network_trains(folder, monkeypatch):
    (folder / "mine.py").write_text("import torch\n\n\n" + python_blocks()[2].split("\n\n\n")[0])
    monkeypatch.syspath_prepend(str(folder))
    import pandas as pd

    import qtorch
    from qtorch.data import Alpha158, DatasetH
    from qtorch.model import LightningModel

    qtorch.init(trusted=["mine"])
    market = SyntheticSource(10, "2019-01-01", "2019-12-31")
    dataset = DatasetH(
        Alpha158(
            source=market,
            instruments="stocks",
            infer_processors=["RobustZScoreNorm", {"class": "Fillna"}],
        ),
        {"train": ("2019-04-01", "2019-08-30"), "valid": ("2019-09-02", "2019-10-31"),
         "test": ("2019-11-01", "2019-12-20")},
    )  # fmt: skip
    model = LightningModel(network={"_target_": "mine.Mean"}, trainer={"max_epochs": 1})
    model.fit(dataset)
    scores = model.predict(dataset)
    assert isinstance(scores, pd.Series)
    assert scores.notna().all()
