"""Run by a Python with pyqlib and torch: what real Qlib does on `fault_cases`, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from fault_cases import BATCH_SIZE, LABELS, SCORES, SEGMENT, STEP_LEN, fault_frame, shown
from qlib.contrib.model.pytorch_gats_ts import DailyBatchSampler
from qlib.contrib.model.pytorch_general_nn import GeneralPTNN
from qlib.contrib.model.pytorch_gru import GRU
from qlib.data.dataset import TSDatasetH
from qlib.data.dataset.handler import DataHandlerLP


def day_batches() -> list[list[str]]:
    """The rows of each batch that GATs' sampler makes of a TSDatasetH."""
    handler = DataHandlerLP.from_df(fault_frame())
    dataset = TSDatasetH(handler=handler, segments={"train": SEGMENT}, step_len=STEP_LEN)
    sampler = dataset.prepare("train", col_set=["feature", "label"])
    return [shown(sampler.get_index()[rows]) for rows in DailyBatchSampler(sampler)]


def losses() -> dict[str, float]:
    """GeneralPTNN's loss of scores `[N]`, as its own default network gives them."""
    model = GeneralPTNN(GPU=-1, n_jobs=0)
    label = torch.tensor(LABELS)
    return {name: float(model.loss_fn(torch.tensor(s), label)) for name, s in SCORES.items()}


def seen(batch_size: int) -> dict[str, int]:
    """The rows of an epoch that GRU's training and its validation look at."""
    model = GRU(d_feat=1, hidden_size=2, num_layers=1, batch_size=batch_size, GPU=-1, seed=0)
    frame, counted = fault_frame(), []
    model.gru_model.register_forward_pre_hook(lambda _, given: counted.append(len(given[0])))
    found = {"rows": len(frame)}
    for name, epoch in (("train", model.train_epoch), ("valid", model.test_epoch)):
        counted.clear()
        with np.errstate(all="ignore"):
            epoch(frame["feature"], frame["label"])
        found[name] = sum(counted)
    return found


def main() -> None:
    print(
        json.dumps(
            {
                "day batches": day_batches(),
                "losses": losses(),
                "seen": seen(BATCH_SIZE),
                "seen in a large batch": seen(20),
            }
        )
    )


if __name__ == "__main__":
    main()
