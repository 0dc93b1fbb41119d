"""Print Qlib's results on `fault_cases` as JSON; needs a Python with pyqlib and torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from fault_cases import BATCH_SIZE, LABELS, SCORES, SEGMENT, STEP_LEN, fault_frame, row_labels
from qlib.contrib.model.pytorch_gats_ts import DailyBatchSampler
from qlib.contrib.model.pytorch_general_nn import GeneralPTNN
from qlib.contrib.model.pytorch_gru import GRU
from qlib.data.dataset import TSDatasetH
from qlib.data.dataset.handler import DataHandlerLP


def day_batches() -> list[list[str]]:
    """The rows of each batch of GATs' sampler on a TSDatasetH."""
    handler = DataHandlerLP.from_df(fault_frame())
    dataset = TSDatasetH(handler=handler, segments={"train": SEGMENT}, step_len=STEP_LEN)
    sampler = dataset.prepare("train", col_set=["feature", "label"])
    return [row_labels(sampler.get_index()[rows]) for rows in DailyBatchSampler(sampler)]


def losses() -> dict[str, float]:
    """GeneralPTNN's loss of scores `[N]`, the shape of its default network's output."""
    model = GeneralPTNN(GPU=-1, n_jobs=0)
    label = torch.tensor(LABELS)
    return {name: float(model.loss_fn(torch.tensor(s), label)) for name, s in SCORES.items()}


def count_seen_rows(batch_size: int) -> dict[str, int]:
    """The number of rows that GRU's training and validation use in one epoch."""
    model = GRU(d_feat=1, hidden_size=2, num_layers=1, batch_size=batch_size, GPU=-1, seed=0)
    frame, batch_sizes = fault_frame(), []
    model.gru_model.register_forward_pre_hook(lambda _, args: batch_sizes.append(len(args[0])))
    counts = {"rows": len(frame)}
    for name, epoch in (("train", model.train_epoch), ("valid", model.test_epoch)):
        batch_sizes.clear()
        with np.errstate(all="ignore"):
            epoch(frame["feature"], frame["label"])
        counts[name] = sum(batch_sizes)
    return counts


def main() -> None:
    print(
        json.dumps(
            {
                "day batches": day_batches(),
                "losses": losses(),
                "seen": count_seen_rows(BATCH_SIZE),
                "seen in a large batch": count_seen_rows(20),
            }
        )
    )


if __name__ == "__main__":
    main()
