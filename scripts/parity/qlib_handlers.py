"""Run by a Python with pyqlib: what real Qlib's handlers and datasets prepare, case by case.

python qlib_handlers.py PROVIDER CASES.json OUT.npz

For each case OUT holds `date` int64 ns, `instrument`, `columns` and `values` of `prepare`; with a
`step_len` the values are the windows of TSDatasetH, once for each fill.
"""

import json
import sys

import numpy as np
import pandas as pd
import qlib
from qlib.contrib.data import handler as alpha
from qlib.data.dataset import DatasetH, TSDatasetH
from qlib.data.dataset.handler import DataHandlerLP

FILLS = ("none", "ffill", "ffill+bfill")


def index_of(index):
    dates = pd.DatetimeIndex(index.get_level_values("datetime")).as_unit("ns")
    return dates.asi8, np.asarray(index.get_level_values("instrument"), dtype="U")


def main():
    provider, wanted, target = sys.argv[1:]
    qlib.init(provider_uri=provider, region="us", kernels=1, logging_level=30)
    with open(wanted) as file:
        cases = json.load(file)
    out = {}
    for name, case in cases.items():
        build = getattr(alpha, case["handler"], None) or DataHandlerLP
        handler, step_len = build(**case["kwargs"]), case.get("step_len")
        more = {} if step_len is None else {"step_len": step_len}
        dataset = (DatasetH if step_len is None else TSDatasetH)(
            handler=handler, segments=case["segments"], **more
        )
        for key in case["keys"]:
            found = dataset.prepare(case["segment"], col_set=case["col_set"], data_key=key)
            where = f"{name}|{key}"
            if step_len is None:
                out[f"{where}|date"], out[f"{where}|instrument"] = index_of(found.index)
                out[f"{where}|values"] = found.to_numpy(dtype=np.float64)
                columns = ["/".join(c) if isinstance(c, tuple) else c for c in found.columns]
                out[f"{where}|columns"] = np.array(columns)
                continue
            out[f"{where}|date"], out[f"{where}|instrument"] = index_of(found.get_index())
            for fill in FILLS:
                found.config(fillna_type=fill)
                windows = np.asarray(found[list(range(len(found)))], dtype=np.float64)
                out[f"{where}|{fill}"] = windows
    np.savez_compressed(target, **out)


if __name__ == "__main__":
    main()
