"""That the default configuration learns what is there, and nothing where nothing is."""

from __future__ import annotations

from statistics import median

import numpy as np
import pytest

from qtorch.data.source.synthetic import SyntheticSource

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("learning")]


def daily_rank_ic(runs, status="FINISHED"):
    """The Rank IC of each test day, run by run."""
    found = runs("qtorch")
    assert {r.status for r in found} == {status}
    return [r.load_object("sig_analysis/ric.pkl") for r in found]


def test_the_default_lstm_finds_at_least_half_of_the_planted_signal(qtorch_cli, runs):
    for seed in range(3):
        # Its best epoch is the first or second; the others would only take longer.
        told = qtorch_cli("train", f"seed={seed}", "trainer.max_epochs=2", "log_level=WARNING")
        assert told.code == 0, told.err
    found = daily_rank_ic(runs)
    assert len(found) == 3
    days = found[0].index
    planted = SyntheticSource().planted_rank_ic(days[0], days[-1])
    assert len(days) > 300
    assert 0.05 < planted.mean() < 0.08
    assert median(ric.mean() for ric in found) >= planted.mean() / 2


def test_a_market_without_a_signal_gives_none(qtorch_cli, runs):
    told = qtorch_cli("train", "data.signal=0", "trainer.max_epochs=1", "log_level=WARNING")
    assert told.code == 0, told.err
    (ric,) = daily_rank_ic(runs)
    error = ric.std() / np.sqrt(len(ric))
    assert error < 0.01
    assert abs(ric.mean()) < 1.96 * error
