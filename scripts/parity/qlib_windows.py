"""Write every window of Qlib's TSDatasetH for each fill as npz; needs a Python with pyqlib.

python qlib_windows.py FRAME.parquet OUT.npz STEP_LEN SEGMENT=START,END ...

FRAME has the index (datetime, instrument) and columns "group/name".
"""

import sys

import numpy as np
import pandas as pd
from qlib.data.dataset import TSDatasetH
from qlib.data.dataset.handler import DataHandlerLP

FILLS = ("none", "ffill", "ffill+bfill")
CHUNK_SIZE = 5000


def windows(sampler):
    count = len(sampler)
    parts = [
        np.asarray(sampler[list(range(first, min(count, first + CHUNK_SIZE)))], dtype=np.float32)
        for first in range(0, count, CHUNK_SIZE)
    ]
    return np.concatenate(parts)


def main():
    source, target, step_len, *spans = sys.argv[1:]
    frame = pd.read_parquet(source)
    frame.columns = pd.MultiIndex.from_tuples([tuple(c.split("/", 1)) for c in frame.columns])
    segments = {}
    for span in spans:
        name, dates = span.split("=")
        segments[name] = tuple(dates.split(","))
    handler = DataHandlerLP.from_df(frame)
    dataset = TSDatasetH(handler=handler, segments=segments, step_len=int(step_len))
    out = {}
    for name in segments:
        sampler = dataset.prepare(name, col_set=["feature", "label"], data_key="infer")
        index = sampler.get_index()
        dates = pd.DatetimeIndex(index.get_level_values("datetime")).as_unit("ns")
        out[f"{name}/date"] = dates.asi8
        out[f"{name}/instrument"] = np.asarray(index.get_level_values("instrument"), dtype="U")
        for fill in FILLS:
            sampler.config(fillna_type=fill)
            out[f"{name}/{fill}"] = windows(sampler)
    np.savez_compressed(target, **out)


if __name__ == "__main__":
    main()
