from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qtorch.metrics.signal import (
    annual_return,
    annual_sharpe,
    calc_ic,
    calc_long_short_return,
    mean_over_std,
)

GOLDEN = Path(__file__).parent / "golden_signal.json"

_ORACLE = """
import json, sys
import pandas as pd
from qlib.contrib.eva.alpha import calc_ic, calc_long_short_return
frame = pd.read_json(sys.argv[1], orient="table")
pred, label = frame["pred"], frame["label"]
out = {}
for name, dropna in (("kept", False), ("dropped", True)):
    ic, ric = calc_ic(pred, label, dropna=dropna)
    long_short, long_avg = calc_long_short_return(pred, label, dropna=dropna)
    series = {"ic": ic, "ric": ric, "long_short": long_short, "long_avg": long_avg}
    out[name] = {k: {str(d.date()): (None if v != v else v) for d, v in s.items()}
                 for k, s in series.items()}
print("RESULT" + json.dumps(out))
"""


def _qtorch_results(signal: pd.DataFrame, dropna: bool) -> dict[str, pd.Series]:
    ic, ric = calc_ic(signal["pred"], signal["label"], dropna=dropna)
    long_short, long_avg = calc_long_short_return(signal["pred"], signal["label"], dropna=dropna)
    return {"ic": ic, "ric": ric, "long_short": long_short, "long_avg": long_avg}


def _compare(signal: pd.DataFrame, expected: dict) -> None:
    for name, dropna in (("kept", False), ("dropped", True)):
        for key, series in _qtorch_results(signal, dropna).items():
            qlib_values = expected[name][key]
            assert [str(d.date()) for d in series.index] == list(qlib_values), (name, key)
            expected_values = [math.nan if v is None else v for v in qlib_values.values()]
            np.testing.assert_allclose(
                series, expected_values, rtol=0, atol=1e-9, err_msg=f"{name} {key}"
            )


def _as_series(results: dict) -> pd.Series:
    return pd.concat(
        {
            (name, key): pd.Series(values, dtype=float)
            for name, values_by_key in results.items()
            for key, values in values_by_key.items()
        }
    )


def test_signal_metrics_equal_stored_qlib_results(signal: pd.DataFrame) -> None:
    _compare(signal, json.loads(GOLDEN.read_text()))


@pytest.mark.qlib
def test_signal_metrics_equal_qlib(signal: pd.DataFrame, tmp_path: Path) -> None:
    path = tmp_path / "signal.json"
    path.write_text(signal.to_json(orient="table", double_precision=15))
    process = subprocess.run(
        [os.environ["QTORCH_QLIB_PYTHON"], "-c", _ORACLE, str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    result = json.loads(process.stdout.split("RESULT")[1])
    _compare(signal, result)
    # The last digits of the golden file depend on the versions of NumPy and pandas.
    golden = json.loads(GOLDEN.read_text())
    pd.testing.assert_series_equal(_as_series(result), _as_series(golden), rtol=1e-12, atol=0)


def test_long_short_return_by_hand() -> None:
    index = pd.MultiIndex.from_product(
        [[pd.Timestamp("2020-01-01")], list("abcdefghij")], names=["datetime", "instrument"]
    )
    pred = pd.Series([9, 8, 7, 6, 5, 4, 3, 2, 1, 0], index=index, dtype=float)
    label = pd.Series([0.3, 0.1, 0, 0, 0, 0, 0, 0, -0.1, -0.3], index=index)
    long_short, average = calc_long_short_return(pred, label)
    assert long_short.iloc[0] == pytest.approx((0.2 - -0.2) / 2)
    assert average.iloc[0] == pytest.approx(0.0)


def test_constant_score_has_nan_ic_despite_rounding(signal: pd.DataFrame) -> None:
    day = signal.loc[[signal.index[0][0]]]
    ic, rank_ic = calc_ic(pd.Series(0.1, index=day.index), day["label"])
    assert ic.isna().all()
    assert rank_ic.isna().all()


def test_ic_does_not_depend_on_row_order(signal: pd.DataFrame) -> None:
    shuffled_signal = signal.sample(frac=1, random_state=0)
    for a, b in zip(
        calc_ic(signal["pred"], signal["label"]),
        calc_ic(shuffled_signal["pred"], shuffled_signal["label"]),
        strict=True,
    ):
        pd.testing.assert_series_equal(a, b)


def test_annual_return_and_sharpe_by_hand() -> None:
    daily = pd.Series([0.01, 0.03, np.nan])
    assert mean_over_std(daily) == pytest.approx(0.02 / np.std([0.01, 0.03], ddof=1))
    assert annual_return(daily) == pytest.approx(0.02 * 252)
    assert annual_sharpe(daily) == pytest.approx(mean_over_std(daily) * math.sqrt(252))
    assert math.isnan(mean_over_std(pd.Series([0.01])))
    # Three times 0.1 has a mean of 0.10000000000000002, so its standard deviation is not zero.
    assert math.isnan(mean_over_std(pd.Series([0.1] * 3)))
