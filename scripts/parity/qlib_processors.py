"""Run Qlib's handlers with the processors of each case; needs a Python with pyqlib.

python qlib_processors.py FRAME.parquet CASES.json OUT.npz

FRAME has the index (datetime, instrument) and columns "group/name". For each case and both data
keys OUT contains `values` float64, `columns`, and `rows`, the row numbers in the frame.
"""

import json
import sys

import joblib
import numpy as np
import pandas as pd
from qlib.data.dataset import DatasetH
from qlib.data.dataset.handler import DataHandlerLP
from qlib.data.dataset.loader import StaticDataLoader


def main():
    source, request_path, target = sys.argv[1:]
    with open(request_path) as file:
        request = json.load(file)
    frame = pd.read_parquet(source)
    frame.columns = pd.MultiIndex.from_tuples([tuple(c.split("/", 1)) for c in frame.columns])
    out = {}
    for name, case in request["cases"].items():
        handler = DataHandlerLP(data_loader=StaticDataLoader(frame.copy()), **case)
        dataset = DatasetH(handler, request["segments"])
        for key in ("infer", "learn"):
            for segment in request["segments"]:
                prepared_frame = dataset.prepare(segment, col_set="__raw", data_key=key)
                label = f"{name}|{key}|{segment}"
                out[f"{label}|values"] = prepared_frame.to_numpy(dtype=np.float64)
                out[f"{label}|rows"] = frame.index.get_indexer(prepared_frame.index).astype(
                    np.int32
                )
                out[f"{label}|columns"] = np.array(["/".join(c) for c in prepared_frame.columns])
    np.savez_compressed(target, **out)


if __name__ == "__main__":
    with joblib.parallel_config("sequential"):  # ProcessInf would start processes for each frame
        main()
