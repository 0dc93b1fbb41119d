"""Skip tests of models whose library, an extra of qtorch, is not installed."""

from __future__ import annotations

import pytest

LIBRARIES = {
    "lightgbm": "lightgbm",
    "double_ensemble": "lightgbm",
    "xgboost": "xgboost",
    "catboost": "catboost",
}


def require_model_library(choice: str) -> None:
    """Skip the test unless the library of a configuration of conf/model can be imported."""
    if choice in LIBRARIES:
        pytest.importorskip(LIBRARIES[choice])
