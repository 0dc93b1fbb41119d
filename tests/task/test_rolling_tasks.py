"""Rolling tasks: segments, truncation by the label's look-ahead, fit windows, generators."""

from __future__ import annotations

import copy
import json
from itertools import pairwise

import pandas as pd
import pytest

from qtorch.core.dates import date_rows
from qtorch.core.errors import ConfigError
from qtorch.core.identity import canonical_json
from qtorch.data.source.synthetic import SyntheticSource
from qtorch.task import MultiHorizonGenBase, RollingGen, TaskGen, task_generator

SOURCE = {
    "_target_": "qtorch.data.SyntheticSource",
    "num_instruments": 6,
    "num_sectors": 2,
    "start_time": "2018-01-01",
    "end_time": "2019-12-31",
    "seed": 0,
}
DAYS = SyntheticSource(6, "2018-01-01", "2019-12-31", num_sectors=2, seed=0).calendar()
SEGMENTS = {
    "train": ["2018-02-01", "2018-12-31"],
    "valid": ["2019-01-01", "2019-03-29"],
    "test": ["2019-04-01", "2019-10-31"],
}


def make_generator(*args, **options) -> RollingGen:
    return RollingGen(*args, calendar=DAYS, **options)


def make_task(form="_target_", segments=SEGMENTS, **handler) -> dict:
    arguments = {"source": SOURCE, "instruments": "stocks", **handler}
    if form == "_target_":
        handler = {"_target_": "qtorch.data.Alpha158", **arguments}
        dataset = {"_target_": "qtorch.data.DatasetH", "handler": handler, "segments": segments}
    else:
        handler = {"class": "Alpha158", "module_path": "qtorch.data", "kwargs": arguments}
        dataset = {"class": "qtorch.data.DatasetH"}
        dataset["kwargs"] = {"handler": handler, "segments": segments}
    return {"model": {"_target_": "qtorch.model.LightningModel"}, "dataset": dataset}


def segments(task: dict) -> dict:
    dataset = task["dataset"]
    return dataset.get("segments") or dataset["kwargs"]["segments"]


def handler(task: dict) -> dict:
    dataset = task["dataset"]
    return dataset["handler"] if "handler" in dataset else dataset["kwargs"]["handler"]["kwargs"]


def row(date: str) -> int:
    return int(DAYS.get_loc(pd.Timestamp(date)))


@pytest.mark.parametrize("form", ["_target_", "class"])
def test_windows_are_consecutive_and_the_task_is_not_modified(form):
    task = make_task(form)
    before = copy.deepcopy(task)
    tasks = make_generator(20)(task)
    assert task == before
    tests = [segments(t)["test"] for t in tasks]
    assert tests[0][0] == "2019-04-01"
    for (start, end), (next_start, _) in pairwise(tests):
        assert row(end) - row(start) == 19
        assert row(next_start) == row(end) + 1
    assert row(tests[-1][0]) <= row("2019-10-31") <= row(tests[-1][1])
    assert len({canonical_json(t) for t in tasks}) == len(tasks)
    assert json.loads(json.dumps(tasks)) == tasks


def test_last_window_ends_with_the_test_segment_without_overshoot():
    tasks = make_generator(20, overshoot=False)(make_task())
    assert segments(tasks[-1])["test"][1] == "2019-10-31"
    assert len(tasks) == len(make_generator(20)(make_task()))
    (only,) = make_generator(500, overshoot=False)(make_task())
    assert segments(only)["test"] == ["2019-04-01", "2019-10-31"]


def test_open_test_segment_extends_to_the_end_of_the_calendar():
    tasks = make_generator(40)(make_task(segments={**SEGMENTS, "test": ["2019-04-01", None]}))
    assert row(segments(tasks[-2])["test"][1]) + 1 == row(segments(tasks[-1])["test"][0])
    assert segments(tasks[-1])["test"][1] is None
    exact_tasks = make_generator(40, overshoot=False)(
        make_task(segments={**SEGMENTS, "test": ["2019-04-01", None]})
    )
    assert segments(exact_tasks[-1])["test"][1] == "2019-12-31"


def test_expanding_keeps_the_train_start_and_sliding_its_length():
    expanding, sliding = (
        make_generator(20, kind)(make_task()) for kind in ("expanding", "sliding")
    )
    assert {segments(t)["train"][0] for t in expanding} == {segments(expanding[0])["train"][0]}
    lengths = {row(segments(t)["train"][1]) - row(segments(t)["train"][0]) for t in sliding}
    assert len(lengths) == 1
    for expanding_task, sliding_task in zip(expanding, sliding, strict=True):
        assert segments(expanding_task)["train"][1] == segments(sliding_task)["train"][1]
        assert segments(expanding_task)["valid"] == segments(sliding_task)["valid"]


# -- look-ahead of the label -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "days"),
    [
        (None, 2),
        (["Ref($close, -6)/Ref($close, -1) - 1"], 6),
        (["$close/Ref($close, 1) - 1"], 0),
    ],
)
def test_default_truncation_is_the_look_ahead_of_the_label(label, days):
    arguments = {} if label is None else {"label": label}
    adjacent_segments = {**SEGMENTS, "valid": ["2019-01-01", "2019-03-31"]}
    tasks = make_generator(20)(make_task(segments=adjacent_segments, **arguments))
    assert tasks == make_generator(20, trunc_days=days)(
        make_task(segments=adjacent_segments, **arguments)
    )
    gap = row(segments(tasks[0])["test"][0]) - row(segments(tasks[0])["valid"][1])
    assert gap == max(days, 1)


def test_horizon_of_the_dataset_overrides_that_of_the_label():
    task = make_task()
    task["dataset"]["horizon"] = 9
    first = make_generator(20)(task)[0]
    assert row(segments(first)["test"][0]) - row(segments(first)["valid"][1]) == 9


@pytest.mark.parametrize("kind", ["expanding", "sliding"])
@pytest.mark.parametrize("days", [None, 0, 4])
def test_no_training_label_reaches_into_the_test_segment(kind, days):
    """Checks the samples: the generator and the dataset do not both remove the same days."""
    from qtorch import init_instance_by_config

    horizon = 2
    adjacent_segments = {
        "train": ["2018-06-01", "2019-03-29"],
        "test": ["2019-04-01", "2019-07-31"],
    }
    plain_handler = {"_target_": "qtorch.data.DataHandlerLP", "source": SOURCE}
    fields = {"feature": ["$close"], "label": ["Ref($close, -2)/Ref($close, -1) - 1"]}
    plain_handler["data_loader"] = {"_target_": "qtorch.data.QlibDataLoader", "config": fields}
    task = make_task(segments=adjacent_segments)
    task["dataset"]["handler"] = {**plain_handler, "instruments": "stocks"}
    for each in make_generator(30, kind, trunc_days=days)(task):
        dataset = init_instance_by_config(each["dataset"])
        dates = dataset.samples("train").index.get_level_values("datetime")
        test = row(segments(each)["test"][0])
        last = row(dates.max())
        assert last + horizon < test
        expected_last = min(row(segments(each)["train"][1]), test - horizon - 1)
        assert last == expected_last  # no further day is removed


# -- fit windows and handler dates -----------------------------------------------------------------


def test_fit_windows_keep_their_position_in_the_train_segment():
    processor = {"class": "ZScoreNorm", "kwargs": {"fit_start_time": "2018-02-01"}}
    processor["kwargs"]["fit_end_time"] = "2018-12-28"
    task = make_task(
        "class",
        fit_start_time="2018-02-05",
        fit_end_time="2018-12-31",
        infer_processors=[processor],
    )
    for kind in ("expanding", "sliding"):
        for each in make_generator(20, kind)(task):
            train, arguments = segments(each)["train"], handler(each)
            processor_kwargs = arguments["infer_processors"][0]["kwargs"]
            assert row(arguments["fit_start_time"]) - row(train[0]) == 2
            assert arguments["fit_end_time"] == train[1]
            assert processor_kwargs["fit_start_time"] == train[0]
            assert row(processor_kwargs["fit_end_time"]) == row(train[1]) - 1


def test_a_placeholder_of_the_train_segment_stays():
    placeholder = "<dataset.kwargs.segments.train.0>"
    task = make_task(fit_start_time=placeholder, fit_end_time="2019-03-29")
    for window in make_generator(20)(task):
        assert handler(window)["fit_start_time"] == placeholder


def test_fit_window_is_clipped_to_the_train_segment_unless_wide_fit_is_allowed():
    task = make_task(fit_start_time="2018-01-01", fit_end_time="2019-03-29")
    first = make_generator(20)(task)[0]
    assert handler(first)["fit_start_time"] == segments(first)["train"][0]
    assert handler(first)["fit_end_time"] == segments(first)["train"][1]
    wide_tasks = make_generator(20)(make_task(**{**handler(task), "allow_wide_fit": True}))
    assert handler(wide_tasks[0])["fit_end_time"] == "2019-03-29"
    assert row(handler(wide_tasks[1])["fit_end_time"]) == row("2019-03-29") + 20


def test_handler_end_is_moved_only_if_needed():
    ends = [handler(t)["end_time"] for t in make_generator(40)(make_task(end_time="2019-07-31"))]
    tests = [segments(t)["test"][1] for t in make_generator(40)(make_task())]
    assert ends == ["2019-07-31" if t <= "2019-07-31" else t for t in tests]
    assert {handler(t).get("end_time") for t in make_generator(40)(make_task())} == {None}
    tasks = make_generator(40, ds_extra_mod_func=None)(make_task(end_time="2019-07-31"))
    assert {handler(t)["end_time"] for t in tasks} == {"2019-07-31"}


def test_ds_extra_mod_func_gets_task_and_generator():
    def add_note(task, generator):
        task["note"] = generator.ta.cal_interval(segments(task)["test"][0], "2019-04-01")

    assert [t["note"] for t in make_generator(50, ds_extra_mod_func=add_note)(make_task())] == [
        0,
        50,
        100,
        150,
    ]


def test_live_handler_is_shared_if_task_copy_func_shares_it():
    from qtorch import init_instance_by_config

    task = make_task()
    live = init_instance_by_config(task["dataset"]["handler"])
    task["dataset"]["handler"] = live
    tasks = make_generator(40, task_copy_func=copy.copy)(task)
    assert all(t["dataset"]["handler"] is live for t in tasks)
    assert task["dataset"]["segments"] == SEGMENTS
    gap = row(segments(tasks[0])["test"][0]) - row(segments(tasks[0])["valid"][1])
    assert gap == 2  # the look-ahead of a live handler's label is known too


def test_default_calendar_is_that_of_the_source_of_the_task():
    assert RollingGen(40)(make_task()) == make_generator(40)(make_task())


def test_gen_following_tasks_continues_after_a_task():
    generator = make_generator(20)
    tasks = generator(make_task())
    assert list(generator.gen_following_tasks(tasks[2], "2019-10-31")) == tasks[3:]


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rtype": "expandin"}, "Did you mean 'expanding'"), ({"step": 0}, "at least one")],
)
def test_invalid_options_are_rejected(options, message):
    with pytest.raises(ConfigError, match=message):
        make_generator(**options)


@pytest.mark.parametrize(
    ("new_segments", "message"),
    [
        ({"train": 0.6, "valid": 0.2, "test": 0.2}, "two dates"),
        ({"train": ["2018-02-01", "2018-12-31"]}, "unknown segment 'test'"),
        ({**SEGMENTS, "test": [None, "2019-10-31"]}, "needs a test segment with a start"),
        ({**SEGMENTS, "valid": ["2019-03-29", "2019-03-29"]}, "no day left"),
    ],
)
def test_segments_that_cannot_be_rolled_are_rejected(new_segments, message):
    with pytest.raises(ConfigError, match=message):
        make_generator(20, trunc_days=5)(make_task(segments=new_segments))


def test_live_dataset_is_rejected():
    with pytest.raises(ConfigError, match="a live object"):
        make_generator(20)({"model": {}, "dataset": object()})


# -- combined generators ---------------------------------------------------------------------------


class Seeds(TaskGen):
    def generate(self, task):
        return [{**task, "seed": seed} for seed in range(3)]


class Horizons(MultiHorizonGenBase):
    def set_horizon(self, task, hr):
        task["dataset"]["handler"]["label"] = [f"Ref($close, -{hr + 1})/Ref($close, -1) - 1"]


def test_task_generator_combines_generators():
    first, second = make_task(), make_task(end_time="2019-11-29")
    windows = len(make_generator(40)(first))
    tasks = task_generator([first, second], [Seeds(), make_generator(40)])
    assert len(tasks) == 2 * 3 * windows
    assert [t["seed"] for t in tasks[: 3 * windows]] == [
        s for s in range(3) for _ in range(windows)
    ]
    assert task_generator(first, Seeds()) == Seeds()(first)
    assert task_generator([], Seeds()) == []


def test_horizons_set_the_label_and_truncate_the_segments():
    task = make_task()
    before = copy.deepcopy(task)
    tasks = Horizons((1, 10), calendar=DAYS)(task)
    assert task == before
    for each, horizon in zip(tasks, (1, 10), strict=True):
        spans = segments(each)
        assert row(spans["test"][0]) - row(spans["valid"][1]) >= horizon + 2
        assert f"-{horizon + 1}" in handler(each)["label"][0]
    assert row(segments(tasks[1])["test"][0]) - row(segments(tasks[1])["valid"][1]) == 12


@pytest.mark.parametrize("freq", ["30min", "60min"])
def test_windows_move_by_the_bars_of_the_data(tmp_path, freq):
    """Half-hours of a session, and hours around the clock, whose midnight is a bar too."""
    hours = (
        [f"{10 + k / 2}h" for k in range(4)] if freq == "30min" else [f"{k}h" for k in range(24)]
    )
    days = pd.bdate_range("2024-01-02", periods=20)
    bars = pd.DatetimeIndex([d + pd.Timedelta(h) for d in days for h in hours])
    table = pd.DataFrame({"datetime": bars, "instrument": "A", "close": 1.0})
    table.to_parquet(tmp_path / "bars.parquet")
    source = {"_target_": "qtorch.data.TableSource", "path": str(tmp_path / "bars.parquet")}
    days = [f"{d:%Y-%m-%d}" for d in days]
    spans = {"train": [days[0], days[9]], "valid": [days[10], days[12]], "test": [days[13], None]}
    label = ["Ref($close, -2)/Ref($close, -1) - 1"]
    tasks = RollingGen(step=3, rtype="sliding")(
        make_task(source=source, segments=spans, label=label)
    )
    rows = [{k: date_rows(bars, *s) for k, s in segments(t).items()} for t in tasks]
    per_day = len(hours)
    assert len(tasks) == -(-7 * per_day // 3)
    for number, row in enumerate(rows):
        shift = 3 * number
        assert row["train"] == slice(shift, 10 * per_day + shift)
        # The label looks two bars ahead, not two days.
        assert row["valid"] == slice(10 * per_day + shift, 13 * per_day + shift - 1)
        if number < len(tasks) - 1:
            assert row["test"] == slice(13 * per_day + shift, 13 * per_day + shift + 3)
    json.dumps(tasks)
