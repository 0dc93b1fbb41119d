"""Compute expressions with Qlib and write the values as .npz; needs a Python with pyqlib.

    python qlib_features.py PROVIDER EXPRESSIONS.json OUT.npz [kernels]

EXPRESSIONS.json is a list of expressions, or "alpha158" or "alpha360". OUT.npz contains `values`
[rows, expressions] float32, `instrument` [rows], `datetime` [rows] int64 ns, `names`, `seconds`.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np


def read_expressions(request: object) -> tuple[list[str], list[str]]:
    """The expressions and their names; for the two feature sets those that Qlib defines."""
    from qlib.contrib.data.loader import Alpha158DL, Alpha360DL

    if request == "alpha158":
        return Alpha158DL.get_feature_config()
    if request == "alpha360":
        return Alpha360DL.get_feature_config()
    return list(request), list(request)


def features(D: object, expressions: list[str]) -> tuple[object, set[str]]:
    """The frame of all expressions that Qlib can compute, and the set of those that fail."""
    instruments = D.instruments("all")
    try:
        return D.features(instruments, expressions, freq="day"), set()
    except Exception:  # Qlib passes on whatever the failing operator raises
        failed_expressions = set()
        for expression in expressions:
            try:
                D.features(instruments, [expression], freq="day")
            except Exception as error:
                print(f"Qlib fails on {expression}: {error!r}"[:200], file=sys.stderr)
                failed_expressions.add(expression)
        valid_expressions = [e for e in expressions if e not in failed_expressions]
        return D.features(instruments, valid_expressions, freq="day"), failed_expressions


def main(provider: str, request_path: str, out: str, kernels: str = "1") -> None:
    import qlib
    from qlib.data import D

    with open(request_path) as file:
        request = json.load(file)
    qlib.init(
        provider_uri=provider,
        region="us",
        kernels=int(kernels),
        expression_cache=None,
        dataset_cache=None,
        logging_level="ERROR",
    )
    expressions, names = read_expressions(request)
    start_time = time.perf_counter()
    frame, failed_expressions = features(D, expressions)
    seconds = time.perf_counter() - start_time
    dates = frame.index.get_level_values("datetime")
    np.savez(
        out,
        values=frame.to_numpy(dtype=np.float32),
        instrument=frame.index.get_level_values("instrument").to_numpy().astype(str),
        datetime=dates.to_numpy().astype("datetime64[ns]").astype(np.int64),
        names=np.array(
            [n for n, e in zip(names, expressions, strict=True) if e not in failed_expressions]
        ),
        expressions=np.array([e for e in expressions if e not in failed_expressions]),
        refused=np.array(sorted(failed_expressions), dtype=str),
        seconds=seconds,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
