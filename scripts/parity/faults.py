"""Faults of Qlib that qtorch does not have, each shown by running both on the same rows.

    QTORCH_QLIB_PYTHON=/path/to/python python scripts/parity/faults.py

- GATs' day batches (pytorch_gats_ts.py, DailyBatchSampler): the windows are sorted by instrument
  but cut by the counts per date, so a "day" contains several days of one or two instruments.
- GeneralPTNN's loss (pytorch_general_nn.py): labels are `[N, 1]` but the scores of its default
  network are `[N]`, so the mean is taken over all N x N pairs.
- Dropped tails (pytorch_gru.py and eleven more; `drop_last` in eight): rows that do not fill a
  batch are neither trained on nor validated; with fewer rows than a batch none is used.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fault_cases import BATCH_SIZE, LABELS, SCORES, STEP_LEN, fault_frame, row_labels

from qtorch.data.dataset.batches import BatchLoader
from qtorch.data.dataset.qlib_dataset import build_samples, view_from_frame
from qtorch.metrics.loss import MSE


@dataclass(frozen=True)
class Fault:
    """One fault: the results of Qlib and of qtorch, and whether each is as expected."""

    name: str
    qlib: str
    qtorch: str
    shows_in_qlib: bool
    is_avoided: bool

    def __str__(self) -> str:
        return f"{self.name}\n    Qlib:   {self.qlib}\n    qtorch: {self.qtorch}"


def ask_qlib(python: str) -> dict[str, Any]:
    """Qlib's results on the rows."""
    script = Path(__file__).with_name("qlib_faults.py")
    process = subprocess.run([python, str(script)], capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"Qlib's side failed:\n{process.stderr[-3000:]}")
    results: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return results


def run_qtorch() -> dict[str, Any]:
    """qtorch's results on the rows."""
    samples = build_samples(view_from_frame(fault_frame()), step_len=STEP_LEN)
    days = BatchLoader(samples, order="day_sequential")
    label = torch.tensor(LABELS)
    return {
        "day batches": [_batch_rows(batch, samples) for batch in days],
        "losses": {name: float(MSE()(torch.tensor(s), label)) for name, s in SCORES.items()},
        "broadcast": _broadcast_error(),
        "seen": _count_seen_rows(samples, BATCH_SIZE),
        "seen in a large batch": _count_seen_rows(samples, 20),
    }


def _batch_rows(batch: Any, samples: Any) -> list[str]:
    is_valid = (
        batch.mask if batch.mask is not None else torch.ones_like(batch.date, dtype=torch.bool)
    )
    dates = samples.calendar[batch.date[is_valid].numpy()]
    names = samples.instruments[batch.instrument[is_valid].numpy()]
    return row_labels(zip(dates, names, strict=True))


def _broadcast_error() -> str:
    label = torch.tensor(LABELS)
    try:
        MSE()(label, label[:, None])
    except ValueError as error:
        return str(error)
    return ""


def _count_seen_rows(samples: Any, batch_size: int) -> dict[str, int]:
    counts = {"rows": len(samples)}
    for name, order in (("train", "random"), ("valid", "sequential")):
        loader = BatchLoader(samples, batch_size=batch_size, order=order)
        counts[name] = sum(batch.num_samples for batch in loader)
    return counts


def faults(qlib_results: dict[str, Any]) -> list[Fault]:
    """Compare Qlib's results with qtorch's."""
    results = run_qtorch()
    return [
        Fault(
            "GATs' day batches",
            _format_batches(qlib_results["day batches"]),
            _format_batches(results["day batches"]),
            max(map(_num_dates, qlib_results["day batches"])) > 1,
            [_num_dates(rows) for rows in results["day batches"]] == [1, 1, 1, 1],
        ),
        Fault(
            "a loss that broadcasts",
            _format_losses(qlib_results["losses"]),
            _format_losses(results["losses"])
            + f"; [N] against [N, 1]: {results['broadcast'] or 'accepted'}",
            qlib_results["losses"]["perfect"] > qlib_results["losses"]["constant"],
            results["losses"]["perfect"] == 0 and bool(results["broadcast"]),
        ),
        Fault(
            "dropped tails",
            _format_counts(qlib_results),
            _format_counts(results),
            qlib_results["seen"]["train"] < qlib_results["seen"]["rows"],
            results["seen"]["rows"] == results["seen"]["train"] == results["seen"]["valid"],
        ),
    ]


def _num_dates(rows: list[str]) -> int:
    return len({row.split()[0] for row in rows})


def _format_batches(batches: list[list[str]]) -> str:
    return " / ".join(", ".join(rows) for rows in batches)


def _format_losses(losses: dict[str, float]) -> str:
    return ", ".join(f"{name} scores {value:.4f}" for name, value in losses.items())


def _format_counts(results: dict[str, Any]) -> str:
    return "; ".join(
        f"batches of {size}: {results[key]['train']} of {results[key]['rows']} rows trained on, "
        f"{results[key]['valid']} validated"
        for key, size in (("seen", BATCH_SIZE), ("seen in a large batch", 20))
    )


def main(python: str) -> list[Fault]:
    """Print and return all faults."""
    fault_list = faults(ask_qlib(python))
    for fault in fault_list:
        print(fault)
    return fault_list


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    fault_list = main(os.environ["QTORCH_QLIB_PYTHON"])
    sys.exit(int(not all(fault.shows_in_qlib and fault.is_avoided for fault in fault_list)))
