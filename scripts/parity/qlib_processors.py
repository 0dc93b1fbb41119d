"""Run by a Python with pyqlib: what real Qlib's handlers make of a frame, case by case.

python qlib_processors.py FRAME.parquet CASES.json OUT.npz

FRAME has the index (datetime, instrument) and columns "group/name". For each case OUT holds,
of both data keys, `values` float64, `columns`, and the rows as places in the frame.
"""

import json
import sys

import numpy as np
import pandas as pd
from qlib.data.dataset import DatasetH
from qlib.data.dataset.handler import DataHandlerLP
from qlib.data.dataset.loader import StaticDataLoader


def main():
    source, wanted, target = sys.argv[1:]
    with open(wanted) as file:
        asked = json.load(file)
    frame = pd.read_parquet(source)
    frame.columns = pd.MultiIndex.from_tuples([tuple(c.split("/", 1)) for c in frame.columns])
    out = {}
    for name, case in asked["cases"].items():
        handler = DataHandlerLP(data_loader=StaticDataLoader(frame.copy()), **case)
        dataset = DatasetH(handler, asked["segments"])
        for key in ("infer", "learn"):
            for segment in asked["segments"]:
                found = dataset.prepare(segment, col_set="__raw", data_key=key)
                where = f"{name}|{key}|{segment}"
                out[f"{where}|values"] = found.to_numpy(dtype=np.float64)
                out[f"{where}|rows"] = frame.index.get_indexer(found.index).astype(np.int32)
                out[f"{where}|columns"] = np.array(["/".join(c) for c in found.columns])
    np.savez_compressed(target, **out)


if __name__ == "__main__":
    main()
