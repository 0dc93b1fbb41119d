from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.errors import ConfigError, ExpressionError
from qtorch.core.instantiate import init_instance_by_config
from qtorch.data import Alpha158, Alpha158vwap, Alpha360, Alpha360vwap, FrameSource, SyntheticSource
from qtorch.data.handler.alpha import SELECTED_20, Alpha158DL, Alpha360DL, alpha360, market_features
from qtorch.data.handler.handler import DataHandlerLP
from qtorch.data.handler.loader import QlibDataLoader
from qtorch.data.panel.columns import PanelColumns
from qtorch.data.panel.window_columns import WindowColumns

SPAN = {"start_time": "2015-06-01", "end_time": "2015-12-31"}
FIT = {"fit_start_time": "2015-06-01", "fit_end_time": "2015-09-30"}


@pytest.fixture(scope="module")
def source() -> SyntheticSource:
    return SyntheticSource(8, "2015-01-01", "2016-01-29", seed=3)


def test_158_columns_in_qlibs_order(source) -> None:
    handler = Alpha158(**SPAN, source=source)
    names = handler.get_cols("feature", "raw")
    assert len(names) == 158
    assert names[:4] == ["KMID", "KLEN", "KMID2", "KUP"]
    assert names[9:15] == ["OPEN0", "HIGH0", "LOW0", "VWAP0", "ROC5", "ROC10"]
    assert names[-1] == "VSUMD60"
    assert handler.get_cols("label") == ["LABEL0"]


def test_market_features_come_last_and_are_equal_for_all_instruments(source) -> None:
    handler = Alpha158("stocks", **SPAN, source=source, columns=["KMID"], market=["market"])
    frame = handler.fetch(col_set="feature", data_key="raw")
    assert list(frame) == ["KMID", *market_features(["market"])[1]]
    assert len(frame.columns) == 22
    assert "MARKET" not in frame.index.get_level_values("instrument")
    by_day = frame.drop(columns="KMID").groupby(level="datetime")
    assert (by_day.nunique(dropna=False) == 1).all(axis=None)
    index = source.features(["MARKET"], ["$close", "$volume"]).droplevel("instrument")
    returns, amount = index["$close"].pct_change(), index["$close"] * index["$volume"]
    expected_values = {
        "RET": returns,
        "RETMEAN60": returns.rolling(60, min_periods=1).mean(),
        "RETSTD5": returns.rolling(5, min_periods=1).std(),
        "AMOUNTMEAN10": amount.rolling(10, min_periods=1).mean() / amount,
        "AMOUNTSTD20": amount.rolling(20, min_periods=1).std() / amount,
    }
    for name, values in expected_values.items():
        first = by_day[f"{name}_market"].first()
        np.testing.assert_allclose(first, values[first.index], rtol=2e-3, atol=1e-5, err_msg=name)
    with pytest.raises(ConfigError, match="must be a list of instruments"):
        Alpha158(source=source, market="MARKET")


def test_mask_reads_another_instrument_for_any_universe() -> None:
    market = SyntheticSource(140, "2015-01-01", "2015-04-30", seed=3)
    loader = QlibDataLoader(["Mask(Mean($close, 5), 'market')", "$close"], source=market)
    last = sorted(market.instruments("stocks"))[-3:]
    for universe in ("stocks", last):  # more instruments than one block, and only three
        masked_values = loader.load(universe, "2015-03-02", "2015-04-30").iloc[:, 0].unstack()
        market_values = market.features(["MARKET"], ["Mean($close, 5)"], "2015-03-02", "2015-04-30")
        num_instruments = len(masked_values.columns)
        assert num_instruments == 3 if universe is last else num_instruments > 130
        # An instrument has no value on a day without a row.
        filled_rows = masked_values.ffill(axis=1).bfill(axis=1)
        np.testing.assert_allclose(filled_rows.iloc[:, 0], market_values.iloc[:, 0], rtol=1e-6)
    one_day = market.features(last, ["Mask(Mean($close, 5), 'market')"], "2015-03-02", "2015-03-02")
    np.testing.assert_allclose(one_day.iloc[:, 0], market_values.iloc[0, 0], rtol=1e-6)
    with pytest.raises(ExpressionError, match="unknown instrument 'nobody'"):
        QlibDataLoader(["Mask($close, 'nobody')"], source=market).load("stocks")


def test_the_label_is_the_return_from_tomorrow(source) -> None:
    close = source.features("all", ["$close"])["$close"].unstack(0)
    expected_label = (close.shift(-2) / close.shift(-1) - 1).loc[
        SPAN["start_time"] : SPAN["end_time"]
    ]
    label = Alpha158(**SPAN, source=source).fetch(col_set="label", data_key="raw")["LABEL0"]
    expected_label = expected_label.stack(future_stack=True).reindex(label.index)
    np.testing.assert_allclose(label, expected_label, rtol=1e-4, atol=1e-6)
    vwap = Alpha158vwap(**SPAN, source=source).get_label_config()
    assert vwap == (["Ref($vwap, -2)/Ref($vwap, -1) - 1"], ["LABEL0"])
    assert Alpha360vwap(**SPAN, source=source).get_label_config() == vwap


def test_default_processors_are_qlibs(source) -> None:
    kinds = [type(p).__name__ for p in Alpha158(source=source).get_all_processors()]
    assert kinds == ["DropnaLabel", "CSZScoreNorm"]
    kinds = [type(p).__name__ for p in Alpha360(source=source).get_all_processors()]
    assert kinds == ["ProcessInf", "ZScoreNorm", "Fillna", "DropnaLabel", "CSZScoreNorm"]


def test_selected_columns_equal_those_of_the_full_set(source) -> None:
    full = Alpha158(**SPAN, source=source)
    selection = Alpha158(**SPAN, source=source, columns=SELECTED_20)
    names = selection.get_cols("feature")
    assert sorted(names) == sorted(SELECTED_20)
    frame = full.fetch(col_set="feature", data_key="raw")
    assert names == [n for n in frame.columns if n in SELECTED_20]
    np.testing.assert_array_equal(selection.fetch(col_set="feature"), frame[names])
    keep = {"class": "FilterCol", "kwargs": {"col_list": list(SELECTED_20)}}
    handler_with_filter = Alpha158(**SPAN, source=source, infer_processors=[keep])
    np.testing.assert_array_equal(handler_with_filter.fetch(col_set="feature"), frame[names])
    assert handler_with_filter._raw is not None
    assert handler_with_filter._raw.group("feature").names == tuple(names)
    with pytest.raises(ConfigError, match="Did you mean 'KSFT'"):
        Alpha158(columns=["KSFT3"], source=source)
    misspelt = {"class": "FilterCol", "kwargs": {"col_list": ["KMIDD"]}}
    with pytest.raises(ConfigError, match="Did you mean 'KMID"):
        Alpha158(**SPAN, source=source, infer_processors=[misspelt]).fetch()


def test_features_are_packed_without_a_copy(source) -> None:
    view = Alpha158(**SPAN, source=source).view("learn")
    columns = view.group("feature")
    assert isinstance(columns, PanelColumns)
    pack = columns.pack("cpu", history=view.history)
    assert pack.values.data_ptr() == columns.column("KMID").data_ptr()


def test_alpha360_windows_equal_the_360_expressions(source) -> None:
    handler = Alpha360(**SPAN, **FIT, source=source)
    columns = handler.view("raw").group("feature")
    assert isinstance(columns, WindowColumns)
    expressions, names = alpha360()
    plain = DataHandlerLP(
        "all", **SPAN, data_loader=QlibDataLoader({"feature": (expressions, names)}), source=source
    )
    expression_values = plain.fetch(col_set="feature")
    window_values = handler.fetch(col_set="feature", data_key="raw")
    assert list(window_values.columns) == names
    np.testing.assert_allclose(window_values, expression_values, rtol=1e-6)
    with pytest.raises(ConfigError, match="six fields of float32"):
        columns.pack(dtype=torch.bfloat16)
    # The first date's window reaches back before the start.
    first = window_values.loc["2015-06-01"]
    assert first["CLOSE59"].notna().any()


def test_alpha360_batches_hold_the_processed_columns(source) -> None:
    handler = Alpha360(**SPAN, **FIT, source=source)
    view = handler.view("infer")
    frame = handler.fetch(col_set="feature")
    pack = view.group("feature").pack("cpu", history=view.history)
    date, instrument = view.sample_rows()
    x = pack.gather(date, instrument)
    assert x.shape[1:] == (60, 6)
    flat = x.transpose(1, 2).flatten(1).numpy()
    np.testing.assert_allclose(flat, frame.to_numpy(), rtol=1e-5, atol=1e-5)
    assert not np.isnan(flat).any()


def test_alpha360_with_infinities_equals_the_expressions() -> None:
    bars = SyntheticSource(5, "2015-01-01", "2015-12-31", seed=3).load(start_time="2015-01-01")
    frame = bars.to_frame()
    frame.loc[("2015-09-01", frame.index[0][1]), "close"] = 0.0
    frame.loc[("2015-09-03", frame.index[1][1]), "volume"] = np.inf
    source = FrameSource(frame)
    expressions = {"feature": alpha360()}
    steps = [{"class": "ProcessInf"}, {"class": "ZScoreNorm"}, {"class": "Fillna"}]
    plain = DataHandlerLP(
        "all",
        **SPAN,
        **FIT,
        data_loader=QlibDataLoader(expressions),
        infer_processors=steps,
        source=source,
    )
    handler = Alpha360(**SPAN, **FIT, source=source)
    raw = handler.fetch(col_set="feature", data_key="raw").to_numpy()
    assert np.isinf(raw).any()
    features, expected_features = (h.fetch(col_set="feature") for h in (handler, plain))
    np.testing.assert_allclose(features, expected_features, rtol=1e-4, atol=1e-4)
    assert np.isfinite(features.to_numpy()).all()


def test_alpha360_some_columns(source) -> None:
    names = ["CLOSE3", "VOLUME0"]
    frame = Alpha360(**SPAN, **FIT, source=source, columns=names).fetch(col_set="feature")
    whole = Alpha360(**SPAN, **FIT, source=source).fetch(col_set="feature")
    np.testing.assert_array_equal(frame[names], whole[names])


def test_custom_labels(source) -> None:
    handler = Alpha158(**SPAN, source=source, label=["Ref($close, -6)/Ref($close, -1)-1"])
    assert handler.get_cols("label") == ["Ref($close, -6)/Ref($close, -1)-1"]
    assert handler.horizon() == 6
    several = Alpha158(
        **SPAN, source=source, label=(["Ref($close,-2)", "Ref($close,-9)"], ["L2", "L9"])
    )
    assert several.get_cols("label") == ["L2", "L9"]
    assert several.horizon() == 9


def test_handler_is_rebuilt_from_its_configuration(source) -> None:
    processors = [{"class": "RobustZScoreNorm", "kwargs": {"fields_group": "feature"}}]
    first = Alpha158(**SPAN, source=source, infer_processors=processors, **FIT)
    config = first.to_config()
    assert config["source"]["_target_"].endswith("SyntheticSource")
    second = init_instance_by_config(config)
    pd.testing.assert_frame_equal(second.fetch(), first.fetch())
    assert processors == [{"class": "RobustZScoreNorm", "kwargs": {"fields_group": "feature"}}]


def test_loaders_without_a_handler(source) -> None:
    assert len(Alpha158DL(source=source).names()["feature"]) == 158
    only = Alpha158DL.get_feature_config({"kbar": {}, "rolling": {"include": ["ROC"]}})
    assert len(only[1]) == 14
    view = Alpha360DL(source=source).view(None, "2015-12-01", "2015-12-31")
    assert view.group("feature").shape[2] == 360
    replacement = Alpha360DL({"feature": (["$close"], ["C"])}, source=source)
    assert replacement.view(None).group("feature").names == ("C",)
    torch.testing.assert_close(
        view.group("feature").column("CLOSE0").nan_to_num(1.0), torch.ones(view.rows.shape)
    )


# -- bars without vwap -----------------------------------------------------------------------------

SHORT_SPAN = {"start_time": "2015-12-01", "end_time": "2015-12-31"}


@pytest.fixture(scope="module")
def bars_without_vwap(source) -> pd.DataFrame:
    return source.load(["open", "high", "low", "close", "volume"]).to_frame()


@pytest.mark.parametrize("kind", [Alpha158, Alpha360])
def test_without_vwap_its_columns_are_nan_with_one_warning(source, bars_without_vwap, kind, caplog):
    options = {**SHORT_SPAN, "infer_processors": (), "learn_processors": ()}
    handler = kind(source=FrameSource(bars_without_vwap), **options)
    frame, expected = (
        each.fetch(data_key="raw") for each in (handler, kind(source=source, **options))
    )
    handler.fetch(data_key="infer")
    is_vwap = expected.columns.get_level_values(-1).str.startswith("VWAP")
    assert is_vwap.sum() == (1 if kind is Alpha158 else 60)
    assert frame.loc[:, is_vwap].isna().all(axis=None)
    pd.testing.assert_frame_equal(frame.loc[:, ~is_vwap], expected.loc[:, ~is_vwap])
    warnings = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "the bars have no field vwap" in warnings[0]
    assert "vwap='(high+low+close)/3'" in warnings[0]


@pytest.mark.parametrize("expression", ["(high+low+close)/3", "($high + $low + $close) / 3"])
def test_an_expression_stands_for_vwap(source, bars_without_vwap, expression, caplog):
    typical = bars_without_vwap.assign(
        vwap=lambda bars: (bars["high"] + bars["low"] + bars["close"]) / 3
    )
    for kind, columns in ((Alpha158vwap, ["KMID", "VWAP0"]), (Alpha360vwap, None)):
        options = {**SHORT_SPAN, "infer_processors": (), "learn_processors": (), "columns": columns}
        handler = kind(source=FrameSource(bars_without_vwap), vwap=expression, **options)
        expected = kind(source=FrameSource(typical), **options).fetch(data_key="raw")
        pd.testing.assert_frame_equal(handler.fetch(data_key="raw"), expected, rtol=1e-5)
    assert "vwap" not in caplog.text
    options = {**SHORT_SPAN, "columns": ["VWAP0"]}
    handler = Alpha158(source=source, vwap=expression, **options)  # the bars' own comes first
    expected = Alpha158(source=source, **options).fetch(data_key="raw", col_set="feature")
    pd.testing.assert_frame_equal(handler.fetch(data_key="raw", col_set="feature"), expected)


def test_a_label_on_a_missing_vwap_is_an_error(bars_without_vwap):
    source = FrameSource(bars_without_vwap)
    with pytest.raises(ExpressionError, match=r"no field vwap, which LABEL0 reads; .*set vwap="):
        Alpha158vwap(source=source, **SHORT_SPAN).fetch()
    with pytest.raises(ConfigError, match="must read no other bars"):
        Alpha158(source=source, vwap="Ref($close, 1)", **SHORT_SPAN).fetch()


def test_without_the_columns_of_vwap_nothing_is_missing(bars_without_vwap, caplog):
    handler = Alpha158(source=FrameSource(bars_without_vwap), columns=["KMID"], **SPAN)
    assert handler.fetch(data_key="raw").shape[1] == 2
    assert "vwap" not in caplog.text


def test_networks_see_the_missing_columns_as_filled(bars_without_vwap):
    processors = [
        {"class": "RobustZScoreNorm", "kwargs": {"fields_group": "feature"}},
        {"class": "Fillna", "kwargs": {"fields_group": "feature"}},
    ]
    for kind in (Alpha158, Alpha360):
        source = FrameSource(bars_without_vwap)
        fit = {f"fit_{name}": date for name, date in SHORT_SPAN.items()}
        handler = kind(source=source, infer_processors=processors, **SHORT_SPAN, **fit)
        frame = handler.fetch(col_set="feature", data_key="infer")
        is_vwap = frame.columns.str.startswith("VWAP")
        assert (frame.loc[:, is_vwap] == 0).all(axis=None)
        assert frame.notna().all(axis=None)
