"""Compare qtorch with Qlib: operators, feature sets, processors, windows, signals, networks,
backtests; and show the faults of Qlib that qtorch does not have.

    python scripts/parity_qlib.py --qlib-python PYTHON [--provider FOLDER] [--only features,windows]

PYTHON must have pyqlib; FOLDER contains real bars in Qlib's layout. A small synthetic market with
irregular data is always included; without FOLDER it is the only one. Prints a table and exits
with 1 if any check fails.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "parity"))

import backtest_cases
import backtest_faults
import backtests as backtest_parity
import expressions as operator_cases
import faults as qlib_faults
import features as feature_parity
import handlers as handler_parity
import networks as network_parity
import portfolio_record
import processor_cases
import processors as processor_parity
import stress
import windows as window_parity

from qtorch.data.source.qlib import QlibSource
from qtorch.data.source.writer import write_qlib
from qtorch.metrics.signal import calc_ic, calc_long_short_return

SIGNAL_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    subject: str
    data: str
    cells: int
    agree: float
    note: str
    passes: bool

    def __str__(self) -> str:
        mark = "ok" if self.passes else "FAILS"
        share = f"{100 * self.agree:9.5f}%"
        return f"| {self.subject} | {self.data} | {self.cells:,} | {share} | {mark} | {self.note} |"


def features(args: argparse.Namespace) -> Iterator[Line]:
    """All operators and the columns of Alpha158 and Alpha360: the fraction of cells that agree."""
    with tempfile.TemporaryDirectory() as folder:
        stress_folder = write_qlib(stress.stress_market(), Path(folder) / "stress")
        markets = [("stress market", str(stress_folder))]
        if args.provider:
            markets.append(("real bars", args.provider))
        for data, provider in markets:
            bars = QlibSource(provider).load()
            cases = {
                "Alpha158": "alpha158",
                "operators": operator_cases.operator_expressions(tuple(bars.instruments[:2])),
                "Alpha360": "alpha360",
            }
            for subject, expressions in cases.items():
                # With all 500 instruments Qlib needs half an hour, so only 120 are used.
                if subject == "operators" and data == "real bars":
                    subset = QlibSource(provider).load(instruments=list(bars.instruments[:120]))
                    provider = str(write_qlib(subset, Path(folder) / "subset"))
                    bars = QlibSource(provider).load()
                answer = feature_parity.ask_qlib(
                    args.qlib_python, provider, expressions, kernels=args.kernels
                )
                yield _feature_line(subject, data, feature_parity.compare(bars, answer))


def _feature_line(subject: str, data: str, rows: list[feature_parity.Row]) -> Line:
    worst = min(rows, key=lambda r: r.agree)
    cells = sum(r.cells for r in rows)
    agree = sum(r.cells * r.agree for r in rows) / cells
    failing = [r.name for r in rows if not r.passes]
    note = f"{len(rows)} columns; least {worst.name[:40]} {100 * worst.agree:.4f}%"
    note += f"; other NaN {sum(r.differing_nan for r in rows)}; flat {sum(r.flat for r in rows)}"
    if failing:
        note += f"; failing: {', '.join(failing[:8])}"
    return Line(subject, data, cells, agree, note, not failing)


def processors(args: argparse.Namespace) -> Iterator[Line]:
    """Each processor alone, and pipelines with both process types."""
    frame, requested_cases = processor_cases.stress_frame(), processor_cases.cases()
    answer = processor_parity.ask_qlib(args.qlib_python, frame, requested_cases)
    rows = processor_parity.compare(frame, answer, requested_cases)
    num_passed = sum(r.cells for r in rows if r.passes)
    worst = max(r.worst for r in rows)
    note = _note(rows) + f"; worst {worst:.1e} of a column's scale"
    cells = sum(r.cells for r in rows)
    yield Line("processors", "stress frame", cells, num_passed / cells, note, num_passed == cells)


def handlers(args: argparse.Namespace) -> Iterator[Line]:
    """Handlers from the stored bars to `prepare`: index, columns, values."""
    with tempfile.TemporaryDirectory() as folder:
        provider = handler_parity.write_market(Path(folder) / "market")
        requested_cases = handler_parity.cases()
        answer = handler_parity.ask_qlib(args.qlib_python, provider, requested_cases)
        rows = handler_parity.compare(provider, answer, requested_cases)
    cells = sum(r.cells for r in rows)
    agree = sum(r.cells * r.agree for r in rows) / cells
    passes = all(r.passes for r in rows)
    yield Line("handlers, prepare", "stress market", cells, agree, _note(rows), passes)


def _note(rows: list[processor_parity.Row] | list[handler_parity.Row]) -> str:
    failing = [r.name for r in rows if not r.passes]
    return f"{len(rows)} cases" + (f"; failing: {', '.join(failing[:8])}" if failing else "")


def windows(args: argparse.Namespace) -> Iterator[Line]:
    """Every window of Qlib's TSDataSampler with all three fills."""
    markets = [("stress market", window_parity.stress_frame(), 7)]
    if args.provider:
        markets.append(("real bars", window_parity.provider_frame(args.provider), 20))
    for data, frame, step_len in markets:
        dates = frame.index.get_level_values("datetime").unique().sort_values()
        cuts = [int(len(dates) * share) for share in (0, 0.7, 0.8, 1.0)]
        spans = itertools.pairwise(cuts)
        names = ("train", "valid", "test")
        segments = {
            name: (str(dates[a].date()), str(dates[b - 1].date()))
            for name, (a, b) in zip(names, spans, strict=True)
        }
        with tempfile.TemporaryDirectory() as folder:
            answer = window_parity.qlib_windows(
                frame, segments, step_len, args.qlib_python, Path(folder)
            )
        rows = window_parity.compare(frame, segments, step_len, answer)
        total, num_different = sum(r.windows for r in rows), sum(r.different for r in rows)
        note = f"{step_len} steps; three segments, three fills; windows, not cells"
        yield Line("windows", data, total, 1 - num_different / total, note, num_different == 0)


SIGNAL_SCRIPT = """
import sys
import numpy as np, pandas as pd
from qlib.contrib.eva.alpha import calc_ic, calc_long_short_return
frame = pd.read_parquet(sys.argv[1])
ic, ric = calc_ic(frame["score"], frame["label"])
long_short, long_avg = calc_long_short_return(frame["score"], frame["label"])
parts = {"ic": ic, "ric": ric, "long_short": long_short, "long_avg": long_avg}
np.savez(sys.argv[2], **{k: v.to_numpy() for k, v in parts.items()})
"""


def signal(args: argparse.Namespace) -> Iterator[Line]:
    """Daily IC, Rank IC, long-short and average returns of the same scores."""
    rng = np.random.default_rng(0)
    dates = pd.bdate_range("2020-01-01", periods=250)
    index = pd.MultiIndex.from_product(
        [dates, [f"S{k}" for k in range(200)]], names=["datetime", "instrument"]
    )
    frame = pd.DataFrame({"label": rng.standard_normal(len(index)) * 0.02}, index=index)
    frame["score"] = (frame["label"] + rng.standard_normal(len(index)) * 0.1).round(2)
    frame = frame[rng.random(len(frame)) > 0.1]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "signal.parquet", Path(folder) / "signal.npz"
        frame.to_parquet(source)
        subprocess.run(
            [args.qlib_python, "-c", SIGNAL_SCRIPT, str(source), str(target)],
            check=True,
            capture_output=True,
        )
        qlib_results = dict(np.load(target))
    ic, ric = calc_ic(frame["score"], frame["label"])
    long_short, long_avg = calc_long_short_return(frame["score"], frame["label"])
    results = {"ic": ic, "ric": ric, "long_short": long_short, "long_avg": long_avg}
    worst = max(float(np.abs(results[k].to_numpy() - qlib_results[k]).max()) for k in results)
    is_close = [
        np.abs(results[k].to_numpy() - qlib_results[k]) <= SIGNAL_TOLERANCE for k in results
    ]
    agree = float(np.concatenate(is_close).mean())
    cells = sum(len(v) for v in results.values())
    yield Line(
        "IC, Rank IC, long-short", "random scores", cells, agree, f"worst {worst:.1e}", agree == 1
    )


def networks(args: argparse.Namespace) -> Iterator[Line]:
    """Each network with Qlib's weights, over a grid of sizes."""
    for row in network_parity.compare(network_parity.ask_qlib(args.qlib_python)):
        subject = f"network {row.network}"
        if not row.is_available:
            yield Line(subject, row.file, 0, 0.0, "not in qtorch.nn", True)
            continue
        note = f"{row.cases} sizes; worst {row.worst:.1e}, scores spread {row.spread:.2f}"
        yield Line(subject, row.file, row.outputs, row.agree / row.outputs, note, row.passes)


def faults(args: argparse.Namespace) -> Iterator[Line]:
    """Qlib's faults: whether Qlib still has them and qtorch avoids them."""
    fault_list = qlib_faults.faults(qlib_faults.ask_qlib(args.qlib_python))
    for fault in [*fault_list, *backtest_faults.faults(args.qlib_python)]:
        note = f"Qlib: {fault.qlib}; qtorch: {fault.qtorch}"
        passes = fault.shows_in_qlib and fault.is_avoided
        yield Line(f"fault: {fault.name}", "by hand", 1, float(fault.is_avoided), note, passes)


def backtests(args: argparse.Namespace) -> Iterator[Line]:
    """Every day's account, positions and costs of 36 settings of TopkDropoutStrategy.

    Settings that differ from Qlib's must agree with its strategy after its faults are repaired,
    which show when a portfolio is too full (see `parity/backtest_faults.py`).
    """
    if not args.provider:
        return
    source, settings_list = QlibSource(args.provider), backtest_cases.cases()
    calendar, names = source.calendar(), sorted(source.instruments("nyse500"))
    scores = backtest_cases.scores(calendar[calendar > "2015-12-24"], names)
    span, benchmark_kwargs = ("2016-01-01", "2017-11-30"), {"benchmark": "NYSE500EW"}

    def run_comparison(
        settings: list[backtest_cases.Case], repair_faults: bool
    ) -> list[backtest_parity.Row]:
        with tempfile.TemporaryDirectory() as folder:
            answers = backtest_parity.ask_qlib(
                args.qlib_python,
                args.provider,
                scores,
                span,
                settings,
                Path(folder),
                repair_faults=repair_faults,
                **benchmark_kwargs,
            )
        results = (
            backtest_parity.run_qtorch(args.provider, scores, span, c, **benchmark_kwargs)
            for c in settings
        )
        pairs = zip(settings, results, answers, strict=True)
        return [backtest_parity.compare(str(c), result, answer) for c, result, answer in pairs]

    rows = run_comparison(settings_list, repair_faults=False)
    differing_cases = [
        case for case, row in zip(settings_list, rows, strict=True) if not row.passes
    ]
    yield _backtest_line("backtests equal to Qlib's", [r for r in rows if r.passes])
    if differing_cases:
        yield _backtest_line(
            "backtests, Qlib's faults repaired", run_comparison(differing_cases, repair_faults=True)
        )


def _backtest_line(subject: str, rows: list[backtest_parity.Row]) -> Line:
    cells = sum(r.cells for r in rows)
    num_passed = sum(r.cells for r in rows if r.passes)
    worst = max(max(r.account, r.amount, r.cost) for r in rows)
    note = f"{len(rows)} settings, {rows[0].days} days; worst relative difference {worst:.1e}"
    failing = [r.name for r in rows if not r.passes]
    note += f"; failing: {failing}" if failing else ""
    return Line(subject, "real bars", cells, num_passed / cells, note, num_passed == cells)


def portfolio(args: argparse.Namespace) -> Iterator[Line]:
    """All metrics logged by PortAnaRecord."""
    if not args.provider:
        return
    source = QlibSource(args.provider)
    calendar = source.calendar("2015-12-25", "2016-12-30")
    scores = backtest_cases.scores(calendar, sorted(source.instruments("nyse500")))
    with tempfile.TemporaryDirectory() as folder:
        qlib_metrics = portfolio_record.ask_qlib(
            args.qlib_python, args.provider, scores, Path(folder)
        )
        metrics = portfolio_record.run_qtorch(args.provider, scores, Path(folder))
    differences = {
        k: abs(metrics.get(k, np.inf) - v) / max(abs(v), 1e-9) for k, v in qlib_metrics.items()
    }
    is_close = [difference <= backtest_parity.TOLERANCE for difference in differences.values()]
    note = (
        f"{', '.join(sorted(qlib_metrics)[:2])}, ...; worst relative difference "
        f"{max(differences.values()):.1e}"
    )
    yield Line(
        "PortAnaRecord, metrics",
        "real bars",
        len(differences),
        float(np.mean(is_close)),
        note,
        all(is_close),
    )


CHECKS: dict[str, Callable[[argparse.Namespace], Iterator[Line]]] = {
    "features": features,
    "processors": processors,
    "handlers": handlers,
    "windows": windows,
    "signal": signal,
    "networks": networks,
    "backtests": backtests,
    "portfolio": portfolio,
    "faults": faults,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--qlib-python", default=os.environ.get("QTORCH_QLIB_PYTHON"))
    parser.add_argument("--provider", help="a folder with bars in Qlib's layout")
    parser.add_argument("--kernels", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default=",".join(CHECKS), help="comma-separated checks")
    args = parser.parse_args()
    if not args.qlib_python:
        parser.error("set --qlib-python or QTORCH_QLIB_PYTHON to a Python with pyqlib")
    if args.provider:
        args.provider = str(Path(args.provider).resolve())
    lines = []
    for name in args.only.split(","):
        for line in CHECKS[name](args):
            print(line, flush=True)
            lines.append(line)
    print("\n| check | data | cells | agree | | note |\n|---|---|---|---|---|---|")
    print("\n".join(map(str, lines)))
    return int(any(not line.passes for line in lines))


if __name__ == "__main__":
    sys.exit(main())
