"""Tests of the probe: each planted leak is found, and the same data without it raises no alarm."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.data import Concepts, DataHandlerLP, DatasetH, SyntheticSource, TSDatasetH
from qtorch.data.dataset.extras import Extra, Gatherable
from qtorch.data.handler.loader import NestedDataLoader, QlibDataLoader, StaticDataLoader
from qtorch.data.panel.panel import Panel
from qtorch.data.processor import (
    DropnaProcessor,
    Fillna,
    Processor,
    RobustZScoreNorm,
    TimeRangeFlt,
    ZScoreNorm,
)
from qtorch.data.source.changed import METHODS
from qtorch.data.source.frame import FrameSource
from qtorch.model.tabular.linear import LinearModel
from qtorch.study import probe
from qtorch.study.leakage.report import LEAK, OK, ProbeReport

LABEL = "Ref($close,-2)/Ref($close,-1)-1"
FIELDS = {"RET": "$close/Ref($close,1)-1", "RANGE": "($high-$low)/$close", "VOL": "$volume"}
SEGMENTS = {
    "train": ("2018-01-01", "2018-06-29"),
    "valid": ("2018-07-02", "2018-08-31"),
    "test": ("2018-09-03", "2018-12-31"),
}


def variants(first: Any, *further: Any) -> list[Any]:
    """Return cases of a leak, of which all but the first are slow tests."""
    return [first, *(pytest.param(each, marks=pytest.mark.slow) for each in further)]


@pytest.fixture(scope="module")
def market() -> SyntheticSource:
    source = SyntheticSource(24, "2018-01-01", "2018-12-31", num_sectors=3, signal=0.1)
    source.panel()
    return source


def make_loader(fields: dict[str, str] = FIELDS, label: str = LABEL, **options: Any):
    config = {
        "feature": (list(fields.values()), list(fields)),
        "label": ([label], ["LABEL0"]),
    }
    return QlibDataLoader(config, **options)


def make_handler(source, loader=None, infer=(), learn=("DropnaLabel",), instruments="stocks", **o):
    loader = make_loader() if loader is None else loader
    return DataHandlerLP(
        instruments,
        data_loader=loader,
        infer_processors=list(infer),
        learn_processors=list(learn),
        source=source,
        **o,
    )


def probe_handler(
    handler, cls=DatasetH, *, methods=("scale",), accept=(), model=None, **options
) -> ProbeReport:
    """Probe a dataset of the handler at one date; by default only one method, to save time."""
    dataset = cls(handler, SEGMENTS, **options)
    return probe(
        dataset, model, dates=["2018-10-16"], methods=methods, accept=accept, fit=bool(model)
    )


@cache
def market_frame() -> pd.DataFrame:
    """Features and labels of the market as a user computes them, without any leak."""
    source = SyntheticSource(24, "2018-01-01", "2018-12-31", num_sectors=3, signal=0.1)
    frame = source.load(instruments="stocks").to_frame()
    close = frame["close"].unstack()
    parts = {
        ("feature", "ret"): close.pct_change(fill_method=None).stack(future_stack=True),
        ("feature", "range"): (frame["high"] - frame["low"]) / frame["close"],
        ("feature", "volume"): frame["volume"],
        ("feature", "close"): frame["close"],
        ("label", "y"): (close.shift(-2) / close.shift(-1) - 1).stack(future_stack=True),
    }
    return pd.DataFrame({k: v.reindex(frame.index) for k, v in parts.items()})


def frame_handler(frame: pd.DataFrame, infer=(), learn=("DropnaLabel",)) -> DataHandlerLP:
    infer = [ZScoreNorm(fields_group="feature"), Fillna(fields_group="feature"), *infer]
    return DataHandlerLP(
        data_loader=StaticDataLoader(frame), infer_processors=infer, learn_processors=list(learn)
    )


def check_leak(report: ProbeReport, *names: str) -> None:
    for name in names:
        assert report.line(name).verdict == LEAK, str(report)


def check_clean(report: ProbeReport) -> None:
    assert not report.has_leak, str(report)


# -- without a leak --------------------------------------------------------------------------------


def test_a_clean_pipeline_has_no_leak(market):
    infer = [RobustZScoreNorm(fields_group="feature"), Fillna(fields_group="feature")]
    handler = make_handler(market, infer=infer)
    report = probe_handler(handler, TSDatasetH, methods=METHODS, step_len=5)
    check_clean(report)
    assert report.line("label").detail == "looks 2 days ahead; declared: 2"
    for name in ("features", "processed features", "windows", "day batches", "fills", "universe"):
        assert report.line(name).verdict == OK


@pytest.mark.slow
def test_a_clean_frame_has_no_leak():
    check_clean(probe_handler(frame_handler(market_frame()), horizon=2))


# -- the leaks -------------------------------------------------------------------------------------


class WholeScale(Processor):
    """Divides by the largest value, or standardizes, over all days."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, view):
        columns = view.group("feature")
        new_columns = {}
        for name in columns.names:
            values = columns.column(name)
            used = values[view.rows & values.isfinite()]
            scaled = values / used.max()
            z = (values - used.mean()) / used.std()
            new_columns[name] = scaled if self.kind == "maximum" else z
        return view.with_group("feature", columns.with_columns(new_columns))


@pytest.mark.parametrize("kind", variants("maximum", "zscore"))
def test_whole_period_normalisation_in_a_processor(market, kind):
    report = probe_handler(make_handler(market, infer=[WholeScale(kind)]))
    check_leak(report, "processed features")
    assert report.line("features").verdict == OK


@pytest.mark.parametrize("kind", variants("zscore by instrument", "zscore", "maximum"))
def test_whole_period_normalisation_in_a_frame(kind):
    frame = market_frame().copy()
    volume = frame["feature", "volume"]
    if kind == "maximum":
        volume = volume / volume.groupby(level="instrument").transform("max")
    elif kind == "zscore":
        volume = np.log(volume)
        volume = (volume - volume.mean()) / volume.std(ddof=0)
    else:
        groups = volume.groupby(level="instrument")
        volume = (volume - groups.transform("mean")) / groups.transform("std")
    frame["feature", "volume"] = volume
    check_leak(probe_handler(frame_handler(frame), horizon=2), "normalisation")


@pytest.mark.parametrize("kind", variants("processor", "handler", "pandas"))
def test_a_processor_fitted_on_test(market, kind):
    options: dict[str, Any] = {"fields_group": "feature"}
    if kind == "pandas":
        infer: list[Any] = [FittedOnEverything()]
    elif kind == "processor":
        infer = [ZScoreNorm(fit_start_time="2018-01-01", fit_end_time="2018-12-31", **options)]
    else:
        infer = [ZScoreNorm(**options)]
    window = {"fit_start_time": "2018-01-01", "fit_end_time": "2018-12-31"}
    handler_options = window if kind == "handler" else {}
    handler = make_handler(market, infer=infer, allow_wide_fit=True, **handler_options)
    report = probe_handler(handler)
    check_leak(report, "processed features")
    if kind != "pandas":
        check_leak(report, "fit window")


class FittedOnEverything(Processor):
    """Learns its mean from all days, whatever the fit window."""

    state_names = ("mean_",)

    def fit(self, view):
        columns = view.group("feature")
        values = [columns.column(name) for name in columns.names]
        self.mean_ = torch.stack([v[v.isfinite()].mean() for v in values])
        self.columns_ = tuple(("feature", n) for n in columns.names)

    def __call__(self, view):
        columns = view.group("feature")
        pairs = zip(columns.names, self.mean_, strict=True)
        new_columns = {n: columns.column(n) - mean for n, mean in pairs}
        return view.with_group("feature", columns.with_columns(new_columns))


@pytest.mark.parametrize(
    "expression",
    variants("Mean(Ref($close,-2),5)/$close", "EMA(Ref($volume,-1),3)", "$close/Ref($close,-9)"),
)
def test_a_centred_window(market, expression):
    loader = make_loader({**FIELDS, "CENTRED": expression})
    report = probe_handler(make_handler(market, loader))
    check_leak(report, "features", "windows", "day batches")
    assert "CENTRED" in report.line("features").detail
    assert "RET " not in report.line("features").detail


@pytest.mark.parametrize("shift", variants(1, -1, 0, 2))
def test_a_label_among_the_features_of_a_frame(shift):
    """The label of day t is the return from t + 1 to t + 2; that of day t - 2 is known on day t."""
    frame = market_frame().copy()
    label = frame["label", "y"]
    frame["feature", "old"] = label.groupby(level="instrument").shift(shift)
    report = probe_handler(frame_handler(frame), horizon=2)
    assert (report.line("labels among features").verdict == LEAK) == (shift < 2)


@pytest.mark.slow
def test_a_label_among_the_features_by_expression(market):
    loader = make_loader({**FIELDS, "OLD": "Ref($close,-1)/$close-1"})
    report = probe_handler(make_handler(market, loader))
    check_leak(report, "features", "labels among features")


class SmallLabels(Processor):
    """Adds the processed label of the same day to a feature."""

    def __call__(self, view):
        columns, label = view.group("feature"), view.group("label").column("LABEL0")
        values = columns.column("RET") + label.nan_to_num()
        return view.with_group("feature", columns.with_columns({"RET": values}))


@pytest.mark.slow
def test_a_label_among_the_features_by_a_processor(market):
    report = probe_handler(make_handler(market, infer=[SmallLabels()]))
    check_leak(report, "processed features", "labels and rows", "permuted labels")


@pytest.mark.parametrize("kind", variants("list", "filter", "spans", "processor"))
def test_membership_known_only_at_the_end(market, kind):
    dying, last = dying_market(), pd.Timestamp("2018-12-31")
    survivors = [n for n, spans in dying.read_membership("all").items() if spans[-1][1] >= last]
    assert len(survivors) < 60
    universe: Any = survivors
    loader, infer = make_loader(), []
    if kind == "filter":
        universe = "all"
        rule = {"filter_type": "ExpressionDFilter", "rule_expression": "Ref($close,-20)>0"}
        loader = make_loader(filter_pipe=[rule])
    elif kind == "processor":
        universe, infer = "all", [TimeRangeFlt(end_time="2018-12-31")]
    elif kind == "spans":
        spans = {n: [(pd.Timestamp("2018-01-01"), last)] for n in survivors}
        source = FrameSource(dying.panel(), universes={"index": spans})
        dying, universe = source, "index"
    handler = make_handler(dying, loader, infer, instruments=universe)
    report = probe_handler(handler, methods=["delete"])
    name = {"filter": "universe", "processor": "rows"}.get(kind, "survivors")
    check_leak(report, name)


@pytest.mark.slow
def test_a_universe_that_instruments_leave_is_clean():
    handler = make_handler(dying_market(), instruments="all")
    check_clean(probe_handler(handler, methods=["delete"]))


@cache
def dying_market() -> FrameSource:
    """A market of 60 instruments, of which a third ends in the year."""
    panel = SyntheticSource(60, "2018-01-01", "2018-12-31", num_sectors=3).load(
        instruments="stocks"
    )
    values = panel.values.clone()
    for k in range(0, 60, 3):
        values[60 + 2 * k :, k] = torch.nan
    return FrameSource(Panel(values, panel.calendar, panel.instruments, panel.fields))


@pytest.mark.parametrize("kind", variants("none", "whole", "dated"))
def test_concepts_without_dates(market, kind):
    names = sorted(market.read_membership("stocks"))
    table = pd.DataFrame({"instrument": names, "concept": [f"C{k % 3}" for k in range(24)]})
    if kind == "whole":
        table["start"] = "2018-01-01"
    if kind == "dated":
        table["start"] = ["2018-01-01", "2018-05-02"] * 12
    report = probe_handler(make_handler(market), extras={"concept": Concepts(table)})
    assert (report.line("concepts").verdict == LEAK) == (kind != "dated")
    assert report.line("extras").verdict == OK


@pytest.mark.parametrize("days", variants(1, 2, 3))
def test_a_frame_whose_features_belong_to_a_later_day(days):
    frame = market_frame().copy()
    features = frame["feature"].groupby(level="instrument").shift(-days)
    for name in features:
        frame["feature", name] = features[name]
    check_leak(probe_handler(frame_handler(frame), horizon=2), "labels among features")


class NextDay(QlibDataLoader):
    """A market series that is joined by its position, one day off."""

    def view(self, *args, **kwargs):
        view = super().view(*args, **kwargs)
        columns = view.group("feature")
        day = columns.column("RET").nan_to_num().mean(1, keepdim=True)
        series = day.roll(-1, 0).expand_as(columns.column("RET")).contiguous()
        return view.with_group("feature", columns.with_columns({"MARKET": series}))


@pytest.mark.slow
def test_a_market_series_of_the_next_day(market):
    base = make_loader()
    loader = NextDay(base.config)
    report = probe_handler(make_handler(market, loader))
    check_leak(report, "features", "market columns")


class OffByOne(DatasetH):
    """Pairs the samples with the labels, or the windows, of the next sample."""

    part = "target"

    def samples(self, *args, **kwargs):
        samples = super().samples(*args, **kwargs)
        if self.part == "window":
            samples._storage_index = (samples.date.roll(-24), samples.instrument)
        elif samples.target is not None:
            samples.target = samples.target.roll(-24, 0)
        return samples


@pytest.mark.parametrize("part", variants("target", "window"))
def test_samples_with_the_series_of_another_day(market, monkeypatch, part):
    monkeypatch.setattr(OffByOne, "part", part)
    check_leak(probe_handler(make_handler(market), OffByOne), "pairs")


class BackFill(Processor):
    """Fills gaps with the next value."""

    def __call__(self, view):
        columns = view.group("feature")
        new_columns = {}
        for name in columns.names:
            frame = pd.DataFrame(columns.column(name).numpy()).bfill()
            new_columns[name] = torch.from_numpy(frame.to_numpy(copy=True))
        return view.with_group("feature", columns.with_columns(new_columns))


@pytest.mark.parametrize("kind", variants("bars", "frame"))
def test_gaps_filled_backwards_by_a_processor(market, kind):
    if kind == "bars":
        report = probe_handler(make_handler(market, infer=[BackFill()]))
    else:
        handler = DataHandlerLP(
            data_loader=StaticDataLoader(market_frame()), infer_processors=[BackFill()]
        )
        report = probe_handler(handler, horizon=2)
    check_leak(report, "fills")
    assert report.line("processed features").verdict == OK


@pytest.mark.slow
def test_leading_days_filled_backwards_in_a_frame():
    frame = market_frame().copy()
    late = [n for k, n in enumerate(sorted(frame.index.levels[1])) if k % 5 == 0]
    is_early = frame.index.get_level_values(0) < "2018-03-01"
    is_late = frame.index.get_level_values(1).isin(late)
    frame.loc[is_early & is_late, "feature"] = np.nan
    frame["feature"] = frame["feature"].groupby(level="instrument").bfill()
    check_leak(probe_handler(frame_handler(frame), horizon=2), "leading days")


class DropExtremes(Processor):
    """Drops the rows with extreme labels, also on test."""

    def __call__(self, view):
        label = view.group("label").column("LABEL0")
        return replace(view, rows=view.rows & ~(label.abs() > 0.03))


@pytest.mark.parametrize("kind", variants("processor", "missing", "frame"))
def test_rows_that_vanish_because_of_their_label(market, kind):
    if kind == "processor":
        report = probe_handler(make_handler(market, infer=[DropExtremes()]))
        check_leak(report, "labels and rows", "rows")
    elif kind == "missing":
        report = probe_handler(make_handler(market, infer=[DropnaProcessor()]))
        check_leak(report, "labels and rows")
    else:
        frame = long_frame()
        y = frame["label", "y"]
        groups = y.groupby(level="datetime")
        z = (y - groups.transform("mean")) / groups.transform("std")
        is_test = frame.index.get_level_values(0) >= "2018-09-03"
        check_clean(probe_handler(frame_handler(frame), horizon=2, methods=["delete"]))
        handler = frame_handler(frame[~(is_test & (z.abs() > 2.0))])
        check_leak(probe_handler(handler, horizon=2, methods=["delete"]), "label tails")


@cache
def long_frame() -> pd.DataFrame:
    """A frame of 100 instruments with fat-tailed labels."""
    rng = np.random.default_rng(0)
    days = pd.bdate_range("2018-01-01", "2018-12-31", name="datetime")
    names = [f"I{k:03d}" for k in range(100)]
    index = pd.MultiIndex.from_product([days, names], names=["datetime", "instrument"])
    parts = {("feature", "a"): rng.normal(size=len(index)).astype("float32")}
    parts["label", "y"] = rng.standard_t(3, len(index)).astype("float32")
    return pd.DataFrame(parts, index=index)


@pytest.mark.parametrize("kind", variants("declared", "overlap", "late train"))
def test_unpurged_windows(market, kind):
    segments: dict[str, Any] = SEGMENTS
    options: dict[str, Any] = {}
    if kind == "declared":
        options = {"horizon": 0}
    elif kind == "overlap":
        segments = {**SEGMENTS, "valid": ("2018-06-01", "2018-08-31")}
        options = {"allow_overlap": True}
    else:
        segments = {"test": ("2018-01-01", "2018-04-30"), "train": ("2018-05-01", "2018-10-31")}
    dataset = DatasetH(make_handler(market), segments, **options)
    report = probe(dataset, dates=["2018-11-15"])
    check_leak(report, "embargo" if kind == "late train" else "purge")
    if kind == "declared":
        check_leak(report, "label")


@pytest.mark.slow
def test_a_late_train_segment_after_an_embargo_is_clean(market):
    segments = {"test": ("2018-01-01", "2018-04-30"), "train": ("2018-05-15", "2018-10-31")}
    check_clean(probe(DatasetH(make_handler(market), segments)))


# -- other loaders -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_leak_in_one_of_nested_loaders(market):
    frame = market_frame()["feature"][["volume"]]
    bars = make_loader({**FIELDS, "NEXT": "Ref($close,-1)/$close"})
    nested = NestedDataLoader([bars, StaticDataLoader({"feature": frame})])
    report = probe_handler(make_handler(market, nested), horizon=2)
    check_leak(report, "features")
    assert "NEXT" in report.line("features").detail
    clean = NestedDataLoader([make_loader(), StaticDataLoader({"feature": frame})])
    check_clean(probe_handler(make_handler(market, clean), horizon=2))


class WholeSegmentMean(LinearModel):
    """Subtracts the mean score of the whole segment, so a score knows the later days."""

    def predict(self, dataset, segment="test"):
        scores = super().predict(dataset, segment)
        return scores - scores.mean()


@pytest.mark.slow
@pytest.mark.parametrize("cls", [LinearModel, WholeSegmentMean])
def test_scores_of_a_model_that_looks_at_later_days(market, cls):
    infer = [ZScoreNorm(fields_group="feature"), Fillna(fields_group="feature")]
    report = probe_handler(make_handler(market, infer=infer), model=cls())
    expected = LEAK if cls is WholeSegmentMean else OK
    assert report.line("scores").verdict == expected, str(report)


class PositionExtra(Extra):
    """A series that is joined by its position from the end of the calendar."""

    def bind(self, calendar, instruments):
        series = torch.arange(len(calendar), 0, -1).float()[:, None]
        return BoundSeries(series.expand(-1, len(instruments)).contiguous())


class BoundSeries(Gatherable):
    def __init__(self, values):
        self.values = values

    def gather(self, date, instrument):
        return self.values[date, instrument][:, None]

    def to(self, device):
        return BoundSeries(self.values.to(device))

    @property
    def width(self):
        return 1


@pytest.mark.slow
def test_an_extra_that_is_joined_by_position(market):
    report = probe_handler(make_handler(market), extras={"series": PositionExtra()})
    check_leak(report, "extras by date")
