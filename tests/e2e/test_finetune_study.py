"""Tests of scripts/finetune_study.py: fine-tuning beats the old network and a new one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"
# Half of the script's years and a stronger signal: seconds instead of minutes.
YEARS = {
    "pretrain": ("2012-01-01", "2013-12-31"),
    "pretrain valid": ("2014-07-01", "2014-12-31"),
    "tune": ("2015-01-01", "2015-06-30"),
    "valid": ("2015-07-01", "2015-09-30"),
    "test": ("2015-10-01", "2016-12-28"),
}
ARGUMENTS = ("--signal", "0.2")
SEEDS = range(20, 32)


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import finetune_study

    monkeypatch.setattr(finetune_study, "YEARS", YEARS)
    monkeypatch.setattr(
        finetune_study, "EMBEDDED", {"start_time": "2011-09-01", "end_time": "2016-12-30"}
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield finetune_study
    torch.set_num_threads(threads)
    for name in ("finetune_study", "workflow_by_code"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_fine_tuning_helps_if_the_market_has_changed(study):
    """Compare on twelve markets, each with its own network.

    The gains are differences on the same bars; their means are well above their standard errors,
    and few markets show no gain.
    """
    arguments = study.build_parser().parse_args(ARGUMENTS)
    results = [study.run_seed(arguments, seed, study.build_data(arguments, seed)) for seed in SEEDS]
    for baseline in (study.PRETRAINED, study.SCRATCH):
        gain = study.metric_gains(results, "all weights", baseline)
        error = gain.std() / len(gain) ** 0.5
        message = f"all weights above {baseline}: {gain.tolist()}"
        assert gain.mean() > max(0.005, 2 * error), message
        assert (gain > 0).sum() >= len(SEEDS) - 2, message
        # The network has learnt the planted signal, not noise in the labels.
        gain = study.metric_gains(results, "all weights", baseline, "true")
        assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5, gain.tolist()
        assert (gain > 0).sum() >= len(SEEDS) - 2, gain.tolist()
    assert study.metric_gains(results, "LoRA, rank 4", study.PRETRAINED).mean() > 0.005
    assert all(
        word in study.format_table(results) for word in ("Rank IC", "from scratch", "head only")
    )
    assert f"of {len(SEEDS)}" in study.format_gains(results)
