"""Infinite values are refused on loading, unless a processor replaces them."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest

from qtorch.core.errors import DataError
from qtorch.data import DataHandler, DataHandlerLP, DatasetH, FrameSource
from qtorch.data.handler.loader import QlibDataLoader, StaticDataLoader

DAYS = pd.bdate_range("2020-01-01", periods=20)
FEATURES = {"feature": (["$close/$open", "Mean($close, 3)"], ["RATIO", "MEAN"])}
LABEL = {"label": (["Ref($close, -1)/$close - 1"], ["LABEL0"])}
ROBUST = {"class": "RobustZScoreNorm", "kwargs": {"fields_group": "feature"}}
RANK = {"class": "CSRankNorm", "kwargs": {"fields_group": "label"}}
FIT = {"fit_start_time": DAYS[0], "fit_end_time": DAYS[9]}


@pytest.fixture
def bars() -> pd.DataFrame:
    index = pd.MultiIndex.from_product([DAYS, list("ABCD")], names=["datetime", "instrument"])
    values = np.random.default_rng(0).uniform(9, 11, (len(index), 2))
    return pd.DataFrame(values, index, ["open", "close"])


def make_handler(bars: pd.DataFrame, infer=(), learn=(), **options) -> DataHandlerLP:
    return DataHandlerLP(
        data_loader=QlibDataLoader({**FEATURES, **LABEL}),
        source=FrameSource(bars),
        infer_processors=list(infer),
        learn_processors=list(learn),
        **{**FIT, **options},
    )


def test_infinite_bars_need_a_processor_that_replaces_them(bars, caplog, tmp_path):
    bars.loc[(DAYS[5], "C"), "close"] = np.inf
    message = (
        r"infinite values in the bars: close \(1\), first C on 2020-01-08\. .*ProcessInf first"
    )
    insufficient = [(), (ROBUST, "Fillna"), (ROBUST, "ProcessInf")]
    for infer in insufficient:
        with pytest.raises(DataError, match=message):
            make_handler(bars, infer).fetch()
    independent = {"process_type": "independent"}
    with pytest.raises(DataError, match=message):
        make_handler(bars, ["ProcessInf"], **independent).fetch()
    loader = QlibDataLoader(FEATURES)
    with pytest.raises(DataError, match=message):
        DataHandler(data_loader=loader, source=FrameSource(bars)).fetch()
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    handler = make_handler(bars, ["ProcessInf", ROBUST], [RANK], cache=tmp_path)
    assert np.isfinite(handler.fetch(col_set="feature")).all(axis=None)
    assert "first C on 2020-01-08. ProcessInf replaces" in caplog.text
    make_handler(bars, ["ProcessInf"], ["ProcessInf"], **independent).fetch()
    with pytest.raises(DataError, match=message):  # cached with infinities allowed
        make_handler(bars, [ROBUST], cache=tmp_path).fetch()


def test_infinities_in_a_users_frame_are_refused(bars):
    frame = pd.concat({"feature": bars, "label": bars[["close"]] - 10}, axis=1)
    frame.iloc[9, 0], frame.iloc[[6, 17], 2] = np.inf, -np.inf
    message = r"the data: feature/open \(1\), first B on 2020-01-03; label/close \(2\), first C on"
    for handler in (
        DataHandlerLP.from_df(frame, learn_processors=[RANK]),
        DataHandler(data_loader=frame),
    ):
        with pytest.raises(DataError, match=message):
            handler.fetch()
    with pytest.raises(DataError, match=r"the data: feature/open \(1\), first B on"):
        DataHandlerLP.from_df(frame["feature"], label="close").fetch(col_set="feature")
    DataHandlerLP.from_df(
        frame, start_time=DAYS[5]
    ).fetch()  # the infinities are before these dates
    repaired_handler = DataHandlerLP.from_df(
        frame, infer_processors=["ProcessInf"], learn_processors=[RANK]
    )
    day = frame["feature", "open"].loc[DAYS[2]].drop("B")
    assert repaired_handler.fetch()["open"].iloc[9] == pytest.approx(day.mean())
    assert np.isinf(StaticDataLoader(frame).load()).any(axis=None)


def test_infinities_from_division_are_allowed_in_features_but_not_in_labels(bars):
    bars.loc[(DAYS[3], "D"), "open"] = 0.0
    ratio = make_handler(bars, [ROBUST], [RANK]).fetch()["RATIO"]
    assert ratio.loc[DAYS[3], "D"] == 3.0  # clipped, as in Qlib
    bars.loc[(DAYS[7], "A"), "close"] = 0.0
    message = r"CSRankNorm would hide infinite labels: LABEL0 \(1\), first A on 2020-01-10\. "
    with pytest.raises(DataError, match=message):
        make_handler(bars, [ROBUST], [RANK]).fetch(data_key="learn")
    dataset = DatasetH(make_handler(bars, [ROBUST]), {"train": (DAYS[0], DAYS[9])})
    with pytest.raises(DataError, match="infinite values in the labels: LABEL0"):
        dataset.samples("train")
    for processor in ("ProcessInf", ReplaceWithNaN()):
        label = make_handler(bars, [processor], [RANK]).fetch(data_key="learn")["LABEL0"]
        assert label.dropna().abs().max() < 1.74


class ReplaceWithNaN:
    """A user's pandas processor that replaces infinities."""

    replaces_infinite = True

    def __call__(self, frame: pd.DataFrame) -> pd.DataFrame:
        return frame.replace([np.inf, -np.inf], np.nan)
