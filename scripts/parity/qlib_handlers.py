"""Run `prepare` of Qlib's handlers and datasets for each case; needs a Python with pyqlib.

python qlib_handlers.py PROVIDER CASES.json OUT.npz

For each case OUT contains `date` int64 ns, `instrument`, `columns` and `values` of `prepare`; with
a `step_len` the values are the windows of TSDatasetH, once for each fill.
"""

import json
import sys

import joblib
import numpy as np
import pandas as pd
import qlib
from qlib.contrib.data import handler as alpha
from qlib.data.dataset import DatasetH, TSDatasetH
from qlib.data.dataset.handler import DataHandlerLP

FILLS = ("none", "ffill", "ffill+bfill")


def index_arrays(index):
    dates = pd.DatetimeIndex(index.get_level_values("datetime")).as_unit("ns")
    return dates.asi8, np.asarray(index.get_level_values("instrument"), dtype="U")


def main():
    provider, request_path, target = sys.argv[1:]
    qlib.init(provider_uri=provider, region="us", kernels=1, logging_level=30)
    with open(request_path) as file:
        cases = json.load(file)
    out = {}
    for name, case in cases.items():
        build = getattr(alpha, case["handler"], None) or DataHandlerLP
        handler, step_len = build(**case["kwargs"]), case.get("step_len")
        kwargs = {} if step_len is None else {"step_len": step_len}
        dataset = (DatasetH if step_len is None else TSDatasetH)(
            handler=handler, segments=case["segments"], **kwargs
        )
        for key in case["keys"]:
            prepared_data = dataset.prepare(case["segment"], col_set=case["col_set"], data_key=key)
            label = f"{name}|{key}"
            if step_len is None:
                out[f"{label}|date"], out[f"{label}|instrument"] = index_arrays(prepared_data.index)
                out[f"{label}|values"] = prepared_data.to_numpy(dtype=np.float64)
                columns = [
                    "/".join(c) if isinstance(c, tuple) else c for c in prepared_data.columns
                ]
                out[f"{label}|columns"] = np.array(columns)
                continue
            out[f"{label}|date"], out[f"{label}|instrument"] = index_arrays(
                prepared_data.get_index()
            )
            for fill in FILLS:
                prepared_data.config(fillna_type=fill)
                windows = np.asarray(
                    prepared_data[list(range(len(prepared_data)))], dtype=np.float64
                )
                out[f"{label}|{fill}"] = windows
    np.savez_compressed(target, **out)


if __name__ == "__main__":
    with joblib.parallel_config("sequential"):  # ProcessInf would start processes for each frame
        main()
