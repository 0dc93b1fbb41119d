"""SegmentICRecord, which is Qlib's MultiSegRecord: named segments, dates and stored results."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from qtorch.core.errors import ConfigError
from qtorch.data import DataHandlerLP, DatasetH, StaticDataLoader
from qtorch.metrics import calc_ic
from qtorch.record import SegmentICRecord

ROOT = Path(__file__).resolve().parents[2]
SEGMENTS = {"valid": ["2020-01-01", "2020-02-28"], "test": ["2020-03-02", "2020-04-30"]}
SPRING = slice("2020-02-17", "2020-03-20")
REQUESTS = {"valid": "valid", "test": "test", "spring": SPRING}


class StoredScores:
    """A model whose scores are the feature of the data."""

    def predict(self, dataset: Any, segment: str | slice = "test") -> pd.Series:
        return dataset.prepare(segment, col_set="feature").iloc[:, 0]


@pytest.fixture
def frame() -> pd.DataFrame:
    """Scores and labels with ties, and with a missing label every now and then."""
    dates = pd.bdate_range("2020-01-01", "2020-04-30").as_unit("ns")
    index = pd.MultiIndex.from_product(
        [dates, [f"I{k:02d}" for k in range(15)]], names=["datetime", "instrument"]
    )
    generator = np.random.default_rng(0)
    label = generator.normal(0, 0.02, len(index)).astype(np.float32)
    score = (label + generator.normal(0, 0.03, len(index))).round(2).astype(np.float32)
    label[generator.random(len(index)) < 0.05] = np.nan
    frame = pd.DataFrame({"score": score, "label": label}, index).astype(float)
    frame.columns = pd.MultiIndex.from_tuples([("feature", "SCORE"), ("label", "LABEL0")])
    return frame


@pytest.fixture
def record(frame, recorder) -> SegmentICRecord:
    parts = {group: frame[group] for group in ("feature", "label")}
    dataset = DatasetH(DataHandlerLP(data_loader=StaticDataLoader(parts)), SEGMENTS)
    return SegmentICRecord(StoredScores(), dataset, recorder)


def test_results_of_segments_and_dates_are_stored_by_name(record, recorder, frame):
    metrics = record.generate(segments=REQUESTS, save=True)
    rows = frame.loc[SPRING.start : SPRING.stop]
    ic, rank_ic = calc_ic(rows["feature", "SCORE"], rows["label", "LABEL0"])
    assert metrics["spring.IC"] == pytest.approx(ic.mean(), rel=1e-9)
    assert recorder.list_metrics()["spring.Rank IC"] == metrics["spring.Rank IC"]
    results = recorder.load_object("results-spring.pkl")
    assert list(results) == ["all-IC", "mean-IC", "all-Rank-IC", "mean-Rank-IC"]
    np.testing.assert_allclose(results["all-Rank-IC"], rank_ic, rtol=1e-9)
    assert results["mean-IC"] == metrics["spring.IC"]


def test_without_segments_those_of_the_record_are_logged_and_nothing_is_stored(record, recorder):
    metrics = record.generate()
    assert {name.partition(".")[0] for name in metrics} == {"valid", "test"}
    assert not [name for name in recorder.list_artifacts() if name.startswith("results")]


def test_a_segment_that_does_not_exist_is_named(record):
    with pytest.raises(ConfigError, match=r"'vald'.*valid"):
        record.generate({"mine": "vald"})
    with pytest.raises(ConfigError, match=r"segments is 'valid'; expected .*\[valid\]"):
        record.generate("valid")


@pytest.mark.qlib
@pytest.mark.slow
def test_results_equal_those_of_qlib(record, recorder, frame, qlib_python, tmp_path):
    frame.to_pickle(tmp_path / "frame.pkl")
    requests = {**REQUESTS, "spring": [SPRING.start, SPRING.stop]}
    job = {"frame": str(tmp_path / "frame.pkl"), "segments": SEGMENTS, "requests": requests}
    job["folder"] = str(tmp_path)
    (tmp_path / "job.json").write_text(json.dumps(job))
    script = ROOT / "scripts" / "parity" / "qlib_segments.py"
    process = subprocess.run(
        [qlib_python, str(script), str(tmp_path / "job.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    qlib_results = json.loads(process.stdout.partition("RESULT")[2])

    record.generate(REQUESTS, save=True)
    for name in REQUESTS:
        results, expected = recorder.load_object(f"results-{name}.pkl"), qlib_results[name]
        assert results.keys() == expected.keys()
        for key in ("mean-IC", "mean-Rank-IC"):
            assert results[key] == pytest.approx(expected[key], rel=1e-9)
        for key in ("all-IC", "all-Rank-IC"):
            days = [str(day.date()) for day in results[key].index]
            assert days == list(expected[key])
            np.testing.assert_allclose(results[key], list(expected[key].values()), atol=1e-9)
