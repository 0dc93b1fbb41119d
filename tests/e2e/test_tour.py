"""The notebook docs/tour.ipynb runs from its first cell to its last, and shows what it promises."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "tour.ipynb"


def list_outputs(notebook: Any) -> list[dict[str, Any]]:
    """Return what the cells show, by MIME type; the log is text/plain."""
    outputs = [o for cell in notebook["cells"] for o in cell.get("outputs", ())]
    assert not [o for o in outputs if o["output_type"] == "error"]
    return [o["data"] if "data" in o else {"text/plain": o["text"]} for o in outputs]


def check_outputs(outputs: list[dict[str, Any]]) -> None:
    pages = ["".join(o.get("text/html", "")) for o in outputs]
    for name in ("LightningModel", "DatasetH", "Recorder MLP"):
        assert any(name in page for page in pages), name
    (model_page,) = (p for p in pages if "<b>LightningModel</b>" in p)
    assert model_page.count("<svg") >= 2
    assert sum("<progress value='6' max='6'>" in page for page in pages) == 2  # of two fits
    assert sum("image/png" in o for o in outputs) == 2
    log = "".join("".join(o.get("text/plain", "")) for o in outputs)
    assert "network MLP: " in log
    assert "ends: FINISHED" in log


@pytest.mark.slow
def test_notebook_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, 4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    check_outputs(list_outputs(notebook))
    assert (tmp_path / "mlruns" / "mlflow.db").is_file()


def test_stored_notebook_has_its_outputs():
    check_outputs(list_outputs(json.loads(NOTEBOOK.read_text())))
