"""The windows of Qlib's MTSDatasetH and those of the dataset that takes its place."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qtorch import init_instance_by_config
from qtorch.core.qlib.translation import translate_config
from qtorch.data import DataHandlerLP

DATES = pd.bdate_range("2020-01-01", periods=12, name="datetime")
SEGMENTS = {"train": ["2020-01-01", "2020-01-08"], "test": ["2020-01-10", "2020-01-16"]}
STEPS = 4
QLIB_SCRIPT = """
import sys
import numpy as np
import pandas as pd
from qlib.contrib.data.dataset import MTSDatasetH
from qlib.data.dataset.handler import DataHandlerLP

folder = sys.argv[1]
handler = DataHandlerLP.from_df(pd.read_parquet(f"{folder}/frame.parquet"))
segments = {"train": ("2020-01-01", "2020-01-08"), "test": ("2020-01-10", "2020-01-16")}
arguments = {"seq_len": 4, "horizon": 1, "num_states": 1, "batch_size": 100, "shuffle": False}
dataset = MTSDatasetH(handler, segments, **arguments)
for name in segments:
    samples = dataset.prepare(name)
    (batch,) = samples
    index = samples.restore_index(batch["index"])  # (instrument, datetime)
    keys = [f"{instrument} {date:%Y-%m-%d}" for instrument, date in index]
    np.savez(f"{folder}/{name}.npz", keys=keys, windows=batch["data"].numpy())
"""


def small_frame() -> pd.DataFrame:
    """Two instruments with two features each; B begins on the fourth day."""
    index = pd.MultiIndex.from_product([DATES, ["A", "B"]], names=["datetime", "instrument"])
    values = np.arange(3 * len(index), dtype=np.float32).reshape(-1, 3) + 1
    pairs = [("feature", "F0"), ("feature", "F1"), ("label", "L")]
    frame = pd.DataFrame(values, index, pd.MultiIndex.from_tuples(pairs))
    is_late = (index.get_level_values(1) == "B") & (index.get_level_values(0) < DATES[3])
    return frame[~is_late]


@pytest.mark.qlib
def test_full_windows_are_those_of_qlib_and_none_sees_another_instrument(
    qlib_python: str, tmp_path: Path
) -> None:
    frame = small_frame()
    frame.to_parquet(tmp_path / "frame.parquet")
    command = [qlib_python, "-c", QLIB_SCRIPT, str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    config = translate_config({
        "class": "qlib.contrib.data.dataset.MTSDatasetH",
        "kwargs": {"handler": {}, "segments": SEGMENTS, "seq_len": STEPS, "horizon": 1},
    })  # fmt: skip
    dataset = init_instance_by_config({**config, "handler": DataHandlerLP.from_df(frame)})
    first_days = {"A": DATES[0], "B": DATES[3]}
    for segment in SEGMENTS:
        answer = np.load(tmp_path / f"{segment}.npz")
        qlib_windows = dict(zip(answer["keys"], answer["windows"], strict=True))
        sampler = dataset.prepare(segment, col_set="feature", data_key="learn")
        num_full = 0
        for k, (date, instrument) in enumerate(sampler.get_index()):
            window, qlib_window = sampler[k], qlib_windows[f"{instrument} {date:%Y-%m-%d}"]
            num_rows = DATES.get_loc(date) - DATES.get_loc(first_days[instrument]) + 1
            length = min(num_rows, STEPS)
            np.testing.assert_array_equal(window[-length:], qlib_window[-length:])
            num_full += num_rows >= STEPS
            if instrument == "B" and num_rows < STEPS:
                # In Qlib the last days of A, which lie in the future, precede the rows of B.
                future = frame.loc[(DATES[-1], "A"), "feature"]
                np.testing.assert_array_equal(qlib_window[-length - 1], future)
                assert not (window > frame.loc[(date, "B"), ("feature", "F1")]).any()
        assert num_full == (3 if segment == "train" else 10)
