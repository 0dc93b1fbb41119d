"""scripts/finetune_study.py: fine-tuning is above the old network and above one from scratch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"
# Half of the years of the script and a stronger signal: what takes minutes there takes seconds.
YEARS = {
    "pretrain": ("2012-01-01", "2013-12-31"),
    "pretrain valid": ("2014-07-01", "2014-12-31"),
    "learn on": ("2015-01-01", "2015-06-30"),
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
def test_fine_tuning_is_worth_it_where_the_market_has_changed(study):
    """Twelve markets, each with a network of its own. The gains are differences on the same bars;
    their means lie well beyond their standard errors, and few markets have none."""
    given = study.parser().parse_args(ARGUMENTS)
    found = [study.one_seed(given, seed, study.data_of(given, seed)) for seed in SEEDS]
    for other in (study.OLD, study.SCRATCH):
        gain = study.gain(found, "all weights", other)
        error = gain.std() / len(gain) ** 0.5
        said = f"all weights above {other}: {gain.tolist()}"
        assert gain.mean() > max(0.005, 2 * error), said
        assert (gain > 0).sum() >= len(SEEDS) - 2, said
        # What was learnt is what was planted, not luck with the labels.
        gain = study.gain(found, "all weights", other, "true")
        assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5, gain.tolist()
        assert (gain > 0).sum() >= len(SEEDS) - 2, gain.tolist()
    assert study.gain(found, "LoRA, rank 4", study.OLD).mean() > 0.005
    assert all(word in study.table(found) for word in ("Rank IC", "from scratch", "head only"))
    assert f"of {len(SEEDS)}" in study.gains(found)
