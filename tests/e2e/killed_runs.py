"""Compare trainings that were killed with undisturbed ones (see `kill_steps.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from training_runs import metric_points

from qtorch import R

EXPERIMENTS = ("whole", "killed")


def compare_rounds(folder: Path, rounds: Sequence[dict[str, str]]) -> None:
    """Raise AssertionError unless each task has one run, equal bit for bit to the undisturbed one.

    `rounds` are the run IDs of each task by experiment.
    """
    with R.uri_context(f"sqlite:///{folder / 'runs.db'}"):
        for experiment in EXPERIMENTS:
            recorders = R.list_recorders(experiment_name=experiment)
            assert set(recorders) == {round_ids[experiment] for round_ids in rounds}
            assert {r.status for r in recorders.values()} == {"FINISHED"}
        for round_ids in rounds:
            runs = [R.get_recorder(recorder_id=round_ids[w]) for w in EXPERIMENTS]
            weights = [r.load_object("params.pkl").network_.state_dict() for r in runs]
            assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
            histories = [metric_points(folder / "runs.db", r.id) for r in runs]
            assert histories[0] == histories[1]
            assert [step for key, step in histories[0] if key == "valid/loss"] == [0, 1, 2, 3]
            scores = [r.load_object("pred.pkl") for r in runs]
            pd.testing.assert_frame_equal(*scores, check_exact=True)
