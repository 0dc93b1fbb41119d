"""What a notebook shows of a model, its training and its results."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from toy_training import fit_model, make_model

from qtorch.core.runtime import is_notebook
from qtorch.core.terminal import html_curves, html_summary


def test_summary_of_a_model(dataset):
    model = make_model(loss="<mse>")
    assert repr(model).startswith("LightningModel(network={'_target_': 'qtorch.nn.MLP'")
    assert "seed=3" in repr(model)
    assert "(not fitted)" in model._repr_html_()
    assert "&lt;mse&gt;" in model._repr_html_()
    text = fit_model(dataset)._repr_html_()
    assert "not fitted" not in text
    assert text.count("<svg") >= 2  # the loss, and the metrics of the valid segment
    assert "train/loss" in text
    assert "best_epoch" in text


def test_curves():
    assert html_curves({"a": [np.nan]}) == ""
    text = html_curves({"a": [1.0, np.nan, 3.0], "<b>": [2.0, 2.0]})
    assert text.count("<polyline") == 2
    assert "points='5.0,135.0 425.0,5.0'" in text
    assert "&lt;b&gt;" in text
    assert "1 to 3" in text
    assert "\x1b" not in html_summary("t", {"a": "\x1b[31m"})


def test_progress_bar_in_a_notebook(dataset, monkeypatch):
    """The display of IPython is replaced: the kernel of a notebook is another process."""
    pages: list[str] = []
    handle = SimpleNamespace(update=pages.append)
    module = SimpleNamespace(
        HTML=str, display=lambda page, display_id: pages.append(page) or handle
    )
    shell = SimpleNamespace(kernel=None)
    ipython = SimpleNamespace(get_ipython=lambda: shell, display=module)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    assert is_notebook()
    fit_model(dataset, trainer={"enable_progress_bar": True}, epochs=2)
    assert pages[0].startswith("<progress")
    assert "epoch 2 of 2, batch" in pages[-1]
    assert "valid/loss 0." in pages[-1] or "valid/loss 1." in pages[-1]


@pytest.mark.parametrize("shell", [None, SimpleNamespace()])
def test_terminals_are_no_notebooks(shell, monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert not is_notebook()
