from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.errors import ConfigError, DataError
from qtorch.data.handler.handler import DataHandlerLP
from qtorch.data.processor import FrameProcessor, PandasProcessor, ZScoreNorm
from qtorch.data.processor.pipeline import build_processors


class Demean:
    """A processor with Qlib's protocol that fits means, writes in place, and drops rows."""

    def __init__(self, fit_start_time=None, fit_end_time=None) -> None:
        self.fit_start_time, self.fit_end_time = fit_start_time, fit_end_time

    def fit(self, df: pd.DataFrame) -> None:
        fit_frame = df.loc[slice(self.fit_start_time, self.fit_end_time)]
        self.mean = fit_frame["feature"].mean().to_numpy()
        self.cols = df["feature"].columns

    def __call__(self, df: pd.DataFrame) -> pd.DataFrame:
        for k, name in enumerate(self.cols):
            df[("feature", name)] = df[("feature", name)] - self.mean[k]
        return df[df[("label", "LABEL0")].notna()]

    def is_for_infer(self) -> bool:
        return False


def test_the_returned_frame_becomes_the_view(frame, view, watch_view) -> None:
    check = watch_view(view)
    processor = PandasProcessor(Demean(None, "2020-01-08"))
    processor.fit(view)
    result = processor(view)
    frame = frame.sort_index()
    mean = frame["feature"].loc[:"2020-01-08"].mean()
    expected = frame.dropna(subset=[("label", "LABEL0")])
    np.testing.assert_allclose(result.frame()["feature"], expected["feature"] - mean, atol=1e-6)
    assert result.frame().index.equals(expected.index)
    check()
    # The processor is only for learning, so windows keep the dropped rows and their values.
    assert torch.equal(result.history, view.history)
    dropped_rows = view.rows & ~result.rows
    torch.testing.assert_close(
        result.group("feature").column("x")[dropped_rows],
        view.group("feature").column("x")[dropped_rows],
        equal_nan=True,
    )


def test_the_fitted_state_is_saved_and_loaded(view) -> None:
    first = PandasProcessor(Demean())
    first.fit(view)
    state = first.get_fitted_state()
    assert state is not None
    assert set(state.tensors) == {"mean"}
    second = PandasProcessor(Demean())
    second.load_fitted_state(state)
    pd.testing.assert_frame_equal(second(view).frame(), first(view).frame())


def test_new_columns_are_allowed_and_new_rows_raise(view) -> None:
    result = PandasProcessor(lambda df: df.assign().join(df[["label"]].rename(
        columns={"label": "more"}, level=0)))(view)  # fmt: skip
    assert result.group("more").names == ("LABEL0",)

    def append_rows(df: pd.DataFrame) -> pd.DataFrame:
        new_rows = df.copy()
        dates = new_rows.index.get_level_values(0) + pd.Timedelta(days=1000)
        new_rows.index = pd.MultiIndex.from_arrays(
            [dates, new_rows.index.get_level_values(1)], names=new_rows.index.names
        )
        return pd.concat([df, new_rows])

    with pytest.raises(DataError, match="must not add rows"):
        PandasProcessor(append_rows)(view)


def test_a_handler_fits_a_pandas_processor_on_the_fit_window(frame) -> None:
    handler = DataHandlerLP.from_df(
        frame, learn_processors=[Demean()], fit_start_time=None, fit_end_time="2020-01-08"
    )
    learn = handler.fetch(col_set="feature", data_key="learn")
    mean = frame.sort_index()["feature"].loc[:"2020-01-08"].mean()
    expected = frame.sort_index().dropna(subset=[("label", "LABEL0")])["feature"] - mean
    np.testing.assert_allclose(learn, expected, atol=1e-6)


def test_the_config_of_a_pandas_processor_is_wrapped() -> None:
    (processor,) = build_processors(
        [{"class": "Demean", "module_path": __file__, "kwargs": {"fit_end_time": "2020-01-08"}}],
        "infer_processors",
    )
    assert isinstance(processor, PandasProcessor)
    assert processor.to_config()["processor"]["kwargs"] == {"fit_end_time": "2020-01-08"}


class Clip(FrameProcessor):
    """A processor as Qlib's users write it, without statistics."""

    def __init__(self, limit: float = 1.0) -> None:
        self.limit = limit

    def __call__(self, df: pd.DataFrame) -> pd.DataFrame:
        df["feature"] = df["feature"].clip(-self.limit, self.limit)
        return df


class Shift(Clip):
    """One with statistics of a fit window."""

    def __init__(self, fit_start_time=None, fit_end_time=None) -> None:
        super().__init__(9.0)
        self.fit_start_time, self.fit_end_time = fit_start_time, fit_end_time

    def fit(self, df: pd.DataFrame | None = None) -> None:
        self.mean_ = df["feature"].mean().to_numpy()


def test_a_processor_of_a_users_own_works_on_frames(frame, view) -> None:
    (clip,) = build_processors([Clip(0.5)], "infer_processors")
    assert isinstance(clip, PandasProcessor)
    assert not clip.has_fit_window()
    assert clip.get_fitted_state() is None
    result = clip(view).frame()["feature"]
    np.testing.assert_allclose(result, view.frame()["feature"].clip(-0.5, 0.5))
    assert clip.to_config()["processor"] == {"_target_": f"{__name__}.Clip", "limit": 0.5}
    shift = PandasProcessor(Shift())
    assert shift.has_fit_window()
    shift.fit(view)
    assert set(shift.get_fitted_state().tensors) == {"mean_"}
    shift.inner.config(fit_end_time="2020-01-08")
    assert shift.inner.fit_end_time == "2020-01-08"
    assert isinstance(ZScoreNorm(), FrameProcessor)
    with pytest.raises(TypeError, match="abstract"):
        FrameProcessor()


def test_invalid_processors_raise() -> None:
    with pytest.raises(ConfigError, match="not a processor"):
        PandasProcessor(3)
    with pytest.raises(ConfigError, match="infer_processors must be a list"):
        build_processors({"class": "Fillna"}, "infer_processors")
