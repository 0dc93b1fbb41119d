"""Small views shared by the tests of the processors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.data.panel.frames import view_from_frame
from qtorch.data.panel.view import View


def small_frame(num_dates: int = 12, num_instruments: int = 7, seed: int = 0) -> pd.DataFrame:
    """Build a frame of three features and a label with NaN, ties and missing rows."""
    rng = np.random.default_rng(seed)
    dates = pd.bdate_range("2020-01-01", periods=num_dates)
    index = pd.MultiIndex.from_product(
        [dates, list("abcdefghijklmnop"[:num_instruments])], names=["datetime", "instrument"]
    )
    x = rng.standard_normal((len(index), 4)).astype(np.float32)
    x[:, 1] = np.round(x[:, 1])
    x[rng.random(x.shape) < 0.1] = np.nan
    groups = [("feature", "x"), ("feature", "y"), ("feature", "z"), ("label", "LABEL0")]
    frame = pd.DataFrame(x, index, pd.MultiIndex.from_tuples(groups))
    return frame[rng.random(len(index)) > 0.1]


@pytest.fixture
def frame() -> pd.DataFrame:
    return small_frame()


@pytest.fixture
def view(frame: pd.DataFrame) -> View:
    return view_from_frame(frame)


@pytest.fixture
def watch_view() -> Callable[[View], Callable[[], None]]:
    """Return a function that records a view and returns a check that it has not changed."""

    def watch(view: View) -> Callable[[], None]:
        before = {(g, n): c.column(n).clone() for g, c in view.groups.items() for n in c.names}
        rows, history = view.rows.clone(), view.history.clone()

        def check() -> None:
            for (g, n), values in before.items():
                torch.testing.assert_close(
                    view.groups[g].column(n), values, rtol=0, atol=0, equal_nan=True
                )
            assert torch.equal(rows, view.rows)
            assert torch.equal(history, view.history)

        return check

    return watch
