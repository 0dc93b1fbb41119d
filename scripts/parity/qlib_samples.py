"""Check that qtorch reads Qlib's DatasetH and TSDatasetH; needs a Python with pyqlib and torch.

python qlib_samples.py FRAME.parquet STEP_LEN SEGMENT=START,END ...

Prints one line per check; fails if a batch differs from Qlib's own data.
"""

import sys

import numpy as np
import pandas as pd
import torch
from qlib.data.dataset import DatasetH, TSDatasetH
from qlib.data.dataset.handler import DataHandlerLP

from qtorch.data.dataset.qlib_dataset import get_samples


def build_handler(frame):
    """Build a Qlib handler whose learn view drops rows without label and z-scores the label."""
    from qlib.data.dataset.loader import StaticDataLoader

    return DataHandlerLP(
        data_loader=StaticDataLoader(frame),
        learn_processors=[
            {"class": "DropnaLabel", "module_path": "qlib.data.dataset.processor"},
            {
                "class": "CSZScoreNorm",
                "module_path": "qlib.data.dataset.processor",
                "kwargs": {"fields_group": "label"},
            },
        ],
    )


def equal(values, qlib_values):
    return np.array_equal(
        np.asarray(values), np.asarray(qlib_values, dtype=np.float32), equal_nan=True
    )


def check_frames(handler, segments):
    dataset = DatasetH(handler=handler, segments=segments)
    for segment in segments:
        for key in ("infer", "learn"):
            frame = dataset.prepare(segment, col_set=["feature", "label"], data_key=key)
            if key == "learn":  # CSZScoreNorm turns the only label of a day into NaN
                frame = frame[frame["label"].notna().all(axis=1)]
            samples = get_samples(dataset, segment, data_key=key)
            assert samples.index.equals(frame.sort_index().index)
            batch = samples.batch(torch.arange(len(samples)))
            assert equal(batch.x[:, 0], frame["feature"].sort_index())
            assert equal(batch.y, frame["label"].sort_index())
            raw = dataset.prepare(segment, col_set="label", data_key="raw").loc[frame.index]
            assert equal(batch.extra["raw_label"], raw.sort_index())
            print(f"DatasetH {segment} {key}: {len(samples)} samples equal")


def check_windows(handler, segments, step_len):
    dataset = TSDatasetH(handler=handler, segments=segments, step_len=step_len)
    for segment in segments:
        for key in ("infer", "learn"):
            sampler = dataset.prepare(segment, col_set=["feature", "label"], data_key=key)
            index = sampler.get_index()
            for fill in ("none", "ffill", "ffill+bfill"):
                sampler.config(fillna_type=fill)
                samples = get_samples(dataset, segment, data_key=key, fill=fill)
                positions = index.get_indexer(samples.index)
                assert (positions >= 0).all()
                dropped_rows = np.delete(np.arange(len(index)), positions)
                assert len(dropped_rows) == 0 or key == "learn"
                for k in dropped_rows:
                    assert np.isnan(sampler[int(k)][-1, -1])
                qlib_windows = np.asarray(sampler[[int(k) for k in positions]])
                batch = samples.batch(torch.arange(len(samples)))
                assert equal(batch.x, qlib_windows[:, :, :-1])
                assert equal(batch.y[:, 0], qlib_windows[:, -1, -1])
            print(f"TSDatasetH {segment} {key}: {len(samples)} windows equal, three fills")


def main():
    source, step_len, *spans = sys.argv[1:]
    frame = pd.read_parquet(source)
    frame.columns = pd.MultiIndex.from_tuples([tuple(c.split("/", 1)) for c in frame.columns])
    segments = {}
    for span in spans:
        name, dates = span.split("=")
        segments[name] = tuple(dates.split(","))
    check_frames(build_handler(frame), segments)
    check_windows(build_handler(frame), segments, int(step_len))


if __name__ == "__main__":
    main()
