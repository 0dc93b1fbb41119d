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


def features(D: object, expressions: list[str]) -> tuple[object, set[str]]:
    """The frame of all expressions that Qlib computes, and those that it fails on."""
    instruments = D.instruments("all")
    try:
        return D.features(instruments, expressions, freq="day"), set()
    except Exception:  # Qlib raises whatever the failing operator raised
        refused = set()
        for expression in expressions:
            try:
                D.features(instruments, [expression], freq="day")
            except Exception as error:
                print(f"Qlib fails on {expression}: {error!r}"[:200], file=sys.stderr)
                refused.add(expression)
        kept = [e for e in expressions if e not in refused]
        return D.features(instruments, kept, freq="day"), refused


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
    frame, refused = features(D, expressions)
    seconds = time.perf_counter() - started
    dates = frame.index.get_level_values("datetime")
    np.savez(
        out,
        values=frame.to_numpy(dtype=np.float32),
        instrument=frame.index.get_level_values("instrument").to_numpy().astype(str),
        datetime=dates.to_numpy().astype("datetime64[ns]").astype(np.int64),
        names=np.array([n for n, e in zip(names, expressions, strict=True) if e not in refused]),
        expressions=np.array([e for e in expressions if e not in refused]),
        refused=np.array(sorted(refused), dtype=str),
        seconds=seconds,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
