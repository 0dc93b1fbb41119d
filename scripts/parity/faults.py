"""Qlib's faults that qtorch does not repeat, each with what both make of the same rows.

    QTORCH_QLIB_PYTHON=/path/to/python python scripts/parity/faults.py

- GATs' day batches (pytorch_gats_ts.py, DailyBatchSampler): the windows are sorted by instrument,
  the counts are taken by date; so a "day" is some days of one instrument, or of two.
- GeneralPTNN's loss (pytorch_general_nn.py): labels are made `[N, 1]`, and its own default
  network scores `[N]`; the mean runs over all N x N pairs.
- Tails (pytorch_gru.py and eleven more; `drop_last` in eight): what does not fill a batch is
  neither trained on nor validated; with fewer rows than a batch nothing is.
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
from fault_cases import BATCH_SIZE, LABELS, SCORES, STEP_LEN, fault_frame, shown

from qtorch.data.batches import BatchLoader
from qtorch.data.foreign import view_of_frame
from qtorch.data.samples import build_samples
from qtorch.metrics.loss import MSE


@dataclass(frozen=True)
class Fault:
    """One fault: what Qlib and qtorch did, and whether each was as expected."""

    name: str
    qlib: str
    ours: str
    shows: bool
    avoided: bool

    def __str__(self) -> str:
        return f"{self.name}\n    Qlib:   {self.qlib}\n    qtorch: {self.ours}"


def ask_qlib(python: str) -> dict[str, Any]:
    """What real Qlib does on the same rows."""
    script = Path(__file__).with_name("qlib_faults.py")
    done = subprocess.run([python, str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"Qlib's side failed:\n{done.stderr[-3000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def ours() -> dict[str, Any]:
    """The same of qtorch."""
    samples = build_samples(view_of_frame(fault_frame()), step_len=STEP_LEN)
    days = BatchLoader(samples, order="day_sequential")
    label = torch.tensor(LABELS)
    return {
        "day batches": [_rows(batch, samples) for batch in days],
        "losses": {name: float(MSE()(torch.tensor(s), label)) for name, s in SCORES.items()},
        "broadcast": _refused(),
        "seen": _seen(samples, BATCH_SIZE),
        "seen in a large batch": _seen(samples, 20),
    }


def _rows(batch: Any, samples: Any) -> list[str]:
    there = batch.mask if batch.mask is not None else torch.ones_like(batch.date, dtype=torch.bool)
    dates = samples.calendar[batch.date[there].numpy()]
    names = samples.instruments[batch.instrument[there].numpy()]
    return shown(zip(dates, names, strict=True))


def _refused() -> str:
    label = torch.tensor(LABELS)
    try:
        MSE()(label, label[:, None])
    except ValueError as error:
        return str(error)
    return ""


def _seen(samples: Any, batch_size: int) -> dict[str, int]:
    found = {"rows": len(samples)}
    for name, order in (("train", "random"), ("valid", "sequential")):
        loader = BatchLoader(samples, batch_size=batch_size, order=order)
        found[name] = sum(batch.num_samples for batch in loader)
    return found


def faults(theirs: dict[str, Any]) -> list[Fault]:
    """Qlib's answers beside qtorch's."""
    own = ours()
    return [
        Fault(
            "GATs' day batches",
            _shown(theirs["day batches"]),
            _shown(own["day batches"]),
            max(map(_num_dates, theirs["day batches"])) > 1,
            [_num_dates(rows) for rows in own["day batches"]] == [1, 1, 1, 1],
        ),
        Fault(
            "a loss that broadcasts",
            _losses(theirs["losses"]),
            _losses(own["losses"]) + f"; [N] against [N, 1]: {own['broadcast'] or 'taken'}",
            theirs["losses"]["perfect"] > theirs["losses"]["constant"],
            own["losses"]["perfect"] == 0 and bool(own["broadcast"]),
        ),
        Fault(
            "dropped tails",
            _counts(theirs),
            _counts(own),
            theirs["seen"]["train"] < theirs["seen"]["rows"],
            own["seen"]["rows"] == own["seen"]["train"] == own["seen"]["valid"],
        ),
    ]


def _num_dates(rows: list[str]) -> int:
    return len({row.split()[0] for row in rows})


def _shown(batches: list[list[str]]) -> str:
    return " / ".join(", ".join(rows) for rows in batches)


def _losses(found: dict[str, float]) -> str:
    return ", ".join(f"{name} scores {value:.4f}" for name, value in found.items())


def _counts(found: dict[str, Any]) -> str:
    return "; ".join(
        f"batches of {size}: {found[key]['train']} of {found[key]['rows']} rows trained on, "
        f"{found[key]['valid']} validated"
        for key, size in (("seen", BATCH_SIZE), ("seen in a large batch", 20))
    )


def main(python: str) -> list[Fault]:
    """Print each fault; the faults."""
    found = faults(ask_qlib(python))
    for fault in found:
        print(fault)
    return found


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    found = main(os.environ["QTORCH_QLIB_PYTHON"])
    sys.exit(int(not all(fault.shows and fault.avoided for fault in found)))
