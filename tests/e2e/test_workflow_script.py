"""Test of scripts/workflow_by_code.py, the main workflow in Python."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "workflow_by_code.py"


@pytest.mark.slow
def test_script_trains_saves_and_evaluates(folder, monkeypatch, capsys, runs):
    spec = importlib.util.spec_from_file_location("workflow_by_code", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    source_config = {"class": "SyntheticSource", "module_path": "qtorch.data"}
    source_config["kwargs"] = {"num_instruments": 60, "start_time": "2017-06-01"}
    monkeypatch.setattr(script, "source_config", lambda arguments: source_config)
    arguments = {"provider_uri": None, "universe": None, "benchmark": None}
    script.main(Namespace(**arguments, epochs=1, seed=0))
    out = capsys.readouterr().out
    (run,) = runs("workflow")
    assert run.id in out
    assert "Rank ICIR" in out
    assert run.status == "FINISHED"
    assert run.list_params()["model.kwargs.trainer.max_epochs"] == "1"
    assert run.load_object("trained_model").network_ is not None
    assert len(run.load_object("sig_analysis/ic.pkl")) > 300
    report = run.load_object("portfolio_analysis/report_normal_1day.pkl")
    assert (report["bench"] != 0).any()
    assert "1day.excess_return_with_cost.information_ratio" in out
