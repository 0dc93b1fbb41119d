"""Run under a Python with pyqlib: what real Qlib makes of expressions, as an .npz.

    python qlib_features.py PROVIDER EXPRESSIONS.json OUT.npz [kernels]

EXPRESSIONS.json is a list of expressions, or "alpha158" or "alpha360". OUT.npz holds `values`
[rows, expressions] float32, `instrument` [rows], `datetime` [rows] int64 ns, `names`, `seconds`.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np


def expressions_of(wanted: object) -> tuple[list[str], list[str]]:
    """The expressions and their names; the two feature sets by Qlib's own lists."""
    from qlib.contrib.data.loader import Alpha158DL, Alpha360DL

    if wanted == "alpha158":
        return Alpha158DL.get_feature_config()
    if wanted == "alpha360":
        return Alpha360DL.get_feature_config()
    return list(wanted), list(wanted)


def main(provider: str, wanted_path: str, out: str, kernels: str = "1") -> None:
    import qlib
    from qlib.data import D

    with open(wanted_path) as file:
        wanted = json.load(file)
    qlib.init(
        provider_uri=provider,
        region="us",
        kernels=int(kernels),
        expression_cache=None,
        dataset_cache=None,
        logging_level="ERROR",
    )
    expressions, names = expressions_of(wanted)
    started = time.perf_counter()
    frame = D.features(D.instruments("all"), expressions, freq="day")
    seconds = time.perf_counter() - started
    np.savez(
        out,
        values=frame.to_numpy(dtype=np.float32),
        instrument=frame.index.get_level_values("instrument").to_numpy().astype(str),
        datetime=frame.index.get_level_values("datetime").to_numpy().astype("datetime64[ns]").astype(np.int64),
        names=np.array(names),
        expressions=np.array(expressions),
        seconds=seconds,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
