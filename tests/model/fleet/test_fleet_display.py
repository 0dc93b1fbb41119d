"""What a fleet shows of all its members, on a terminal, in a notebook and in the log."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from toy_training import ToyDataset, make_model

from qtorch.model import FleetError, fit_fleet
from qtorch.model.lightning_model import LightningModel


def make_members(**changes: Any) -> list[LightningModel]:
    trainer = {"enable_progress_bar": None}
    members = [make_model(seed=k, epochs=2 + k, trainer=trainer, **changes) for k in range(3)]
    return members


class TerminalStream(io.StringIO):
    def isatty(self) -> bool:
        return True


def replace_stderr(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Replace stderr by a terminal, on which a bar appears at once.

    A test calls it itself, because pytest sets stderr anew between a fixture and its test.
    """
    stream = TerminalStream()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr("qtorch.core.runtime.SHOW_AFTER_SECONDS", -1.0)
    monkeypatch.setattr("qtorch.model.fleet.display.NOTEBOOK_SECONDS", -1.0)
    return stream


def test_a_terminal_shows_all_members(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = replace_stderr(monkeypatch)
    models = make_members()
    fit_fleet(models, ToyDataset(), max_members=2)
    text = screen.getvalue()
    assert "2 running, 0 ended, 1 waiting" in text
    assert "1 running, 2 ended, 0 waiting, best valid/loss" in text
    assert "samples/s" in text
    assert min(m.fit_report_["best_value"] for m in models) == pytest.approx(
        float(text.rpartition("best valid/loss ")[2].split()[0]), rel=1e-3
    )


def test_nothing_is_shown_of_a_short_training(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = replace_stderr(monkeypatch)
    monkeypatch.setattr("qtorch.core.runtime.SHOW_AFTER_SECONDS", 3600.0)
    fit_fleet(make_members(), ToyDataset())
    assert "running" not in screen.getvalue()


def test_the_bar_can_be_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = replace_stderr(monkeypatch)
    models = make_members()
    for model in models:
        model.trainer["enable_progress_bar"] = False
    fit_fleet(models, ToyDataset())
    assert "running" not in screen.getvalue()


def test_a_notebook_shows_all_members(monkeypatch: pytest.MonkeyPatch) -> None:
    """The display of IPython is replaced: the kernel of a notebook is another process."""
    screen = replace_stderr(monkeypatch)
    pages: list[str] = []
    handle = SimpleNamespace(update=pages.append)

    def display(page: str, display_id: bool) -> SimpleNamespace:
        pages.append(page)
        return handle

    module = SimpleNamespace(HTML=str, display=display)
    shell = SimpleNamespace(kernel=None)
    ipython = SimpleNamespace(get_ipython=lambda: shell, display=module)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    fit_fleet(make_members(), ToyDataset())
    assert pages[0].startswith("<progress")
    assert "3 running, 0 ended, 0 waiting" in pages[0]
    assert "1 running, 2 ended, 0 waiting, best valid/loss" in pages[-1]
    assert "running" not in screen.getvalue()


def test_the_summary_counts_all_jobs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "qtorch")
    models = make_members()
    models[0].optimizer = {"lr": 1e38}  # its loss becomes NaN
    models[1].early_stop, models[1].monitor = {"patience": 1, "min_delta": 100.0}, "ic"
    models[1].trainer["max_epochs"] = 50
    refused_model = make_model(optimizer="Adagrad", epochs=1)
    with pytest.raises(FleetError, match="1 of 4 fits failed"):
        fit_fleet([*models, refused_model], ToyDataset())
    (summary,) = [m for m in caplog.messages if m.startswith("fleet: ")]
    assert summary.startswith(
        "fleet: 4 of 4 jobs ended, 3 of them as members (1 stopped early), 1 failed, best "
    )
    for text in ("valid/ic", "(job 1)", "valid/loss", "(job 2)", "samples/s in"):
        assert text in summary
