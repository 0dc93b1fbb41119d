from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.errors import ConfigError, DataError
from qtorch.data.handler import DataHandlerLP
from qtorch.data.processor import PandasProcessor
from qtorch.data.processor.build import build_processors


class Demean:
    """A user's processor of Qlib's protocol: learns means, writes in place, drops rows."""

    def __init__(self, fit_start_time=None, fit_end_time=None) -> None:
        self.fit_start_time, self.fit_end_time = fit_start_time, fit_end_time

    def fit(self, df: pd.DataFrame) -> None:
        seen = df.loc[slice(self.fit_start_time, self.fit_end_time)]
        self.mean = seen["feature"].mean().to_numpy()
        self.cols = df["feature"].columns

    def __call__(self, df: pd.DataFrame) -> pd.DataFrame:
        for k, name in enumerate(self.cols):
            df[("feature", name)] = df[("feature", name)] - self.mean[k]
        return df[df[("label", "LABEL0")].notna()]

    def is_for_infer(self) -> bool:
        return False


def test_rows_values_and_columns_come_back(frame, view, unchanged) -> None:
    check = unchanged(view)
    processor = PandasProcessor(Demean(None, "2020-01-08"))
    processor.fit(view)
    result = processor(view)
    frame = frame.sort_index()
    mean = frame["feature"].loc[:"2020-01-08"].mean()
    expected = frame.dropna(subset=[("label", "LABEL0")])
    np.testing.assert_allclose(result.frame()["feature"], expected["feature"] - mean, atol=1e-6)
    assert result.frame().index.equals(expected.index)
    check()
    # For learning alone: what it dropped stays in windows, as it was.
    assert torch.equal(result.history, view.history)
    gone = view.rows & ~result.rows
    torch.testing.assert_close(
        result.group("feature").column("x")[gone],
        view.group("feature").column("x")[gone],
        equal_nan=True,
    )


def test_its_state_is_stored_without_pickle(view) -> None:
    first = PandasProcessor(Demean())
    first.fit(view)
    state = first.fitted_state()
    assert state is not None
    assert set(state.tensors) == {"mean"}
    second = PandasProcessor(Demean())
    second.load_fitted(state)
    pd.testing.assert_frame_equal(second(view).frame(), first(view).frame())


def test_new_columns_may_come_and_new_rows_may_not(view) -> None:
    added = PandasProcessor(lambda df: df.assign().join(df[["label"]].rename(
        columns={"label": "more"}, level=0)))(view)  # fmt: skip
    assert added.group("more").names == ("LABEL0",)

    def doubled(df: pd.DataFrame) -> pd.DataFrame:
        later = df.copy()
        dates = later.index.get_level_values(0) + pd.Timedelta(days=1000)
        later.index = pd.MultiIndex.from_arrays(
            [dates, later.index.get_level_values(1)], names=later.index.names
        )
        return pd.concat([df, later])

    with pytest.raises(DataError, match="drop rows, not add them"):
        PandasProcessor(doubled)(view)


def test_handlers_adapt_it_and_fit_it_on_the_window(frame) -> None:
    handler = DataHandlerLP.from_df(
        frame, learn_processors=[Demean()], fit_start_time=None, fit_end_time="2020-01-08"
    )
    learn = handler.fetch(col_set="feature", data_key="learn")
    mean = frame.sort_index()["feature"].loc[:"2020-01-08"].mean()
    expected = frame.sort_index().dropna(subset=[("label", "LABEL0")])["feature"] - mean
    np.testing.assert_allclose(learn, expected, atol=1e-6)


def test_a_configuration_of_a_foreign_class_is_adapted() -> None:
    (made,) = build_processors(
        [{"class": "Demean", "module_path": __file__, "kwargs": {"fit_end_time": "2020-01-08"}}],
        "infer_processors",
    )
    assert isinstance(made, PandasProcessor)
    assert made.to_config()["processor"]["kwargs"] == {"fit_end_time": "2020-01-08"}


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(ConfigError, match="no processor"):
        PandasProcessor(3)
    with pytest.raises(ConfigError, match="infer_processors must be a list"):
        build_processors({"class": "Fillna"}, "infer_processors")
