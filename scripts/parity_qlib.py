"""qtorch's numbers beside real Qlib's: operators, feature sets, processors, windows, signals,
networks, backtests; and the faults of Qlib's that it does not repeat.

    python scripts/parity_qlib.py --qlib-python PYTHON [--provider FOLDER] [--only features,windows]

PYTHON has pyqlib; FOLDER holds real bars in Qlib's layout (without it a small market full of
dirt serves, which is always part of it). Prints a table and ends with 1 where anything fails.
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
from qtorch.data.source.qlib_writer import write_qlib
from qtorch.metrics.signal import calc_ic, calc_long_short_return

SIGNAL_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    what: str
    where: str
    cells: int
    agree: float
    note: str
    passes: bool

    def __str__(self) -> str:
        mark = "ok" if self.passes else "FAILS"
        share = f"{100 * self.agree:9.5f}%"
        return f"| {self.what} | {self.where} | {self.cells:,} | {share} | {mark} | {self.note} |"


def features(args: argparse.Namespace) -> Iterator[Line]:
    """Every operator, and the 158 and 360 columns: the share of cells that agree."""
    with tempfile.TemporaryDirectory() as folder:
        small = write_qlib(stress.stress_market(), Path(folder) / "stress")
        places = [("stress market", str(small))]
        if args.provider:
            places.append(("real bars", args.provider))
        for where, provider in places:
            bars = QlibSource(provider).load()
            cases = {
                "Alpha158": "alpha158",
                "operators": operator_cases.operator_expressions(tuple(bars.instruments[:2])),
                "Alpha360": "alpha360",
            }
            for what, wanted in cases.items():
                # All 500 take Qlib half an hour.
                if what == "operators" and where == "real bars":
                    some = QlibSource(provider).load(instruments=list(bars.instruments[:120]))
                    provider = str(write_qlib(some, Path(folder) / "some"))
                    bars = QlibSource(provider).load()
                answer = feature_parity.ask_qlib(
                    args.qlib_python, provider, wanted, kernels=args.kernels
                )
                yield _feature_line(what, where, feature_parity.compare(bars, answer))


def _feature_line(what: str, where: str, rows: list[feature_parity.Row]) -> Line:
    worst = min(rows, key=lambda r: r.agree)
    cells = sum(r.cells for r in rows)
    agree = sum(r.cells * r.agree for r in rows) / cells
    failing = [r.name for r in rows if not r.passes]
    note = f"{len(rows)} columns; least {worst.name[:40]} {100 * worst.agree:.4f}%"
    note += f"; other NaN {sum(r.other_nan for r in rows)}; flat {sum(r.flat for r in rows)}"
    if failing:
        note += f"; failing: {', '.join(failing[:8])}"
    return Line(what, where, cells, agree, note, not failing)


def processors(args: argparse.Namespace) -> Iterator[Line]:
    """Every processor alone, and both process types."""
    frame, asked = processor_cases.stress_frame(), processor_cases.cases()
    answer = processor_parity.ask_qlib(args.qlib_python, frame, asked)
    rows = processor_parity.compare(frame, answer, asked)
    good = sum(r.cells for r in rows if r.passes)
    worst = max(r.worst for r in rows)
    note = _note(rows) + f"; worst {worst:.1e} of a column's scale"
    cells = sum(r.cells for r in rows)
    yield Line("processors", "stress frame", cells, good / cells, note, good == cells)


def handlers(args: argparse.Namespace) -> Iterator[Line]:
    """Handlers from files to `prepare`: index, columns, values."""
    with tempfile.TemporaryDirectory() as folder:
        provider = handler_parity.write_market(Path(folder) / "market")
        asked = handler_parity.cases()
        answer = handler_parity.ask_qlib(args.qlib_python, provider, asked)
        rows = handler_parity.compare(provider, answer, asked)
    cells = sum(r.cells for r in rows)
    agree = sum(r.cells * r.agree for r in rows) / cells
    passes = all(r.passes for r in rows)
    yield Line("handlers, prepare", "stress market", cells, agree, _note(rows), passes)


def _note(rows: list[processor_parity.Row] | list[handler_parity.Row]) -> str:
    failing = [r.name for r in rows if not r.passes]
    return f"{len(rows)} cases" + (f"; failing: {', '.join(failing[:8])}" if failing else "")


def windows(args: argparse.Namespace) -> Iterator[Line]:
    """Every window of TSDataSampler with all three fills."""
    places = [("stress market", window_parity.stress_frame(), 7)]
    if args.provider:
        places.append(("real bars", window_parity.provider_frame(args.provider), 20))
    for where, frame, step_len in places:
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
        total, wrong = sum(r.windows for r in rows), sum(r.different for r in rows)
        note = f"{step_len} steps; three segments, three fills; windows, not cells"
        yield Line("windows", where, total, 1 - wrong / total, note, wrong == 0)


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
    """Daily IC, Rank IC, long-short and long-average of the same scores."""
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
        theirs = dict(np.load(target))
    ic, ric = calc_ic(frame["score"], frame["label"])
    long_short, long_avg = calc_long_short_return(frame["score"], frame["label"])
    ours = {"ic": ic, "ric": ric, "long_short": long_short, "long_avg": long_avg}
    worst = max(float(np.abs(ours[k].to_numpy() - theirs[k]).max()) for k in ours)
    close = [np.abs(ours[k].to_numpy() - theirs[k]) <= SIGNAL_TOLERANCE for k in ours]
    agree = float(np.concatenate(close).mean())
    cells = sum(len(v) for v in ours.values())
    yield Line(
        "IC, Rank IC, long-short", "random scores", cells, agree, f"worst {worst:.1e}", agree == 1
    )


def networks(args: argparse.Namespace) -> Iterator[Line]:
    """Each network with Qlib's weights over a grid of sizes."""
    for row in network_parity.compare(network_parity.ask_qlib(args.qlib_python)):
        what = f"network {row.ours}"
        if not row.here:
            yield Line(what, row.file, 0, 0.0, "not in qtorch.nn", True)
            continue
        note = f"{row.cases} sizes; worst {row.worst:.1e}, scores spread {row.spread:.2f}"
        yield Line(what, row.file, row.outputs, row.agree / row.outputs, note, row.passes)


def faults(args: argparse.Namespace) -> Iterator[Line]:
    """What Qlib does wrong: whether it still does, and qtorch does not."""
    found = qlib_faults.faults(qlib_faults.ask_qlib(args.qlib_python))
    for fault in [*found, *backtest_faults.faults(args.qlib_python)]:
        note = f"Qlib: {fault.qlib}; qtorch: {fault.ours}"
        right = fault.shows and fault.avoided
        yield Line(f"fault: {fault.name}", "by hand", 1, float(fault.avoided), note, right)


def backtests(args: argparse.Namespace) -> Iterator[Line]:
    """Every day's account, position and cost of 36 settings of TopkDropoutStrategy.

    Where they differ from Qlib's, they must be those of its strategy with its faults repaired,
    those of a portfolio that is too full (`parity/backtest_faults.py` shows them).
    """
    if not args.provider:
        return
    source, asked = QlibSource(args.provider), backtest_cases.cases()
    calendar, names = source.calendar(), sorted(source.instruments("nyse500"))
    scores = backtest_cases.scores(calendar[calendar > "2015-12-24"], names)
    span, market = ("2016-01-01", "2017-11-30"), {"benchmark": "NYSE500EW"}

    def compared(settings: list[backtest_cases.Case], mended: bool) -> list[backtest_parity.Row]:
        with tempfile.TemporaryDirectory() as folder:
            answers = backtest_parity.ask_qlib(
                args.qlib_python,
                args.provider,
                scores,
                span,
                settings,
                Path(folder),
                mended=mended,
                **market,
            )
        own = (backtest_parity.ours(args.provider, scores, span, c, **market) for c in settings)
        pairs = zip(settings, own, answers, strict=True)
        return [backtest_parity.compare(str(c), mine, theirs) for c, mine, theirs in pairs]

    rows = compared(asked, mended=False)
    other = [case for case, row in zip(asked, rows, strict=True) if not row.passes]
    yield _backtest_line("backtests equal to Qlib's", [r for r in rows if r.passes])
    if other:
        yield _backtest_line("backtests, its faults repaired", compared(other, mended=True))


def _backtest_line(what: str, rows: list[backtest_parity.Row]) -> Line:
    cells = sum(r.cells for r in rows)
    good = sum(r.cells for r in rows if r.passes)
    worst = max(max(r.account, r.amount, r.cost) for r in rows)
    note = f"{len(rows)} settings, {rows[0].days} days; worst relative difference {worst:.1e}"
    failing = [r.name for r in rows if not r.passes]
    note += f"; failing: {failing}" if failing else ""
    return Line(what, "real bars", cells, good / cells, note, good == cells)


def portfolio(args: argparse.Namespace) -> Iterator[Line]:
    """The metrics that PortAnaRecord logs, name by name."""
    if not args.provider:
        return
    source = QlibSource(args.provider)
    calendar = source.calendar("2015-12-25", "2016-12-30")
    scores = backtest_cases.scores(calendar, sorted(source.instruments("nyse500")))
    with tempfile.TemporaryDirectory() as folder:
        theirs = portfolio_record.ask_qlib(args.qlib_python, args.provider, scores, Path(folder))
        own = portfolio_record.ours(args.provider, scores, Path(folder))
    far = {k: abs(own.get(k, np.inf) - v) / max(abs(v), 1e-9) for k, v in theirs.items()}
    close = [difference <= backtest_parity.TOLERANCE for difference in far.values()]
    note = (
        f"{', '.join(sorted(theirs)[:2])}, ...; worst relative difference {max(far.values()):.1e}"
    )
    yield Line(
        "PortAnaRecord, metrics", "real bars", len(far), float(np.mean(close)), note, all(close)
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
    parser.add_argument("--provider", help="a folder in Qlib's layout")
    parser.add_argument("--kernels", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default=",".join(CHECKS), help="checks, by comma")
    args = parser.parse_args()
    if not args.qlib_python:
        parser.error("name a Python with pyqlib: --qlib-python or QTORCH_QLIB_PYTHON")
    if args.provider:
        args.provider = str(Path(args.provider).resolve())
    lines = []
    for name in args.only.split(","):
        for line in CHECKS[name](args):
            print(line, flush=True)
            lines.append(line)
    print("\n| what | where | cells | agree | | note |\n|---|---|---|---|---|---|")
    print("\n".join(map(str, lines)))
    return int(any(not line.passes for line in lines))


if __name__ == "__main__":
    sys.exit(main())
