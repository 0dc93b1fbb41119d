"""Rolled tasks: what moves, what stays, and that no label reaches into a test."""

from __future__ import annotations

import copy
import json
from itertools import pairwise

import pandas as pd
import pytest

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


def roll(*args, **options) -> RollingGen:
    return RollingGen(*args, calendar=DAYS, **options)


def make(form="_target_", segments=SEGMENTS, **handler) -> dict:
    given = {"source": SOURCE, "instruments": "stocks", **handler}
    if form == "_target_":
        handler = {"_target_": "qtorch.data.Alpha158", **given}
        dataset = {"_target_": "qtorch.data.DatasetH", "handler": handler, "segments": segments}
    else:
        handler = {"class": "Alpha158", "module_path": "qtorch.data", "kwargs": given}
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
def test_windows_follow_each_other_and_the_caller_keeps_his_task(form):
    task = make(form)
    before = copy.deepcopy(task)
    tasks = roll(20)(task)
    assert task == before
    tests = [segments(t)["test"] for t in tasks]
    assert tests[0][0] == "2019-04-01"
    for (start, end), (following, _) in pairwise(tests):
        assert row(end) - row(start) == 19
        assert row(following) == row(end) + 1
    assert row(tests[-1][0]) <= row("2019-10-31") <= row(tests[-1][1])
    assert len({canonical_json(t) for t in tasks}) == len(tasks)
    assert json.loads(json.dumps(tasks)) == tasks


def test_the_last_window_ends_with_the_test_where_it_may_not_overshoot():
    tasks = roll(20, overshoot=False)(make())
    assert segments(tasks[-1])["test"][1] == "2019-10-31"
    assert len(tasks) == len(roll(20)(make()))
    (only,) = roll(500, overshoot=False)(make())
    assert segments(only)["test"] == ["2019-04-01", "2019-10-31"]


def test_a_test_without_an_end_goes_to_the_calendars():
    tasks = roll(40)(make(segments={**SEGMENTS, "test": ["2019-04-01", None]}))
    assert row(segments(tasks[-2])["test"][1]) + 1 == row(segments(tasks[-1])["test"][0])
    assert segments(tasks[-1])["test"][1] is None
    closed = roll(40, overshoot=False)(make(segments={**SEGMENTS, "test": ["2019-04-01", None]}))
    assert segments(closed[-1])["test"][1] == "2019-12-31"


def test_expanding_keeps_the_start_and_sliding_the_length():
    expanding, sliding = (roll(20, kind)(make()) for kind in ("expanding", "sliding"))
    assert {segments(t)["train"][0] for t in expanding} == {segments(expanding[0])["train"][0]}
    lengths = {row(segments(t)["train"][1]) - row(segments(t)["train"][0]) for t in sliding}
    assert len(lengths) == 1
    for one, other in zip(expanding, sliding, strict=True):
        assert segments(one)["train"][1] == segments(other)["train"][1]
        assert segments(one)["valid"] == segments(other)["valid"]


# -- what the label may see ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "days"),
    [
        (None, 2),
        (["Ref($close, -6)/Ref($close, -1) - 1"], 6),
        (["$close/Ref($close, 1) - 1"], 0),
    ],
)
def test_the_default_cut_is_how_far_the_label_looks(label, days):
    given = {} if label is None else {"label": label}
    close = {**SEGMENTS, "valid": ["2019-01-01", "2019-03-31"]}
    made = roll(20)(make(segments=close, **given))
    assert made == roll(20, trunc_days=days)(make(segments=close, **given))
    gap = row(segments(made[0])["test"][0]) - row(segments(made[0])["valid"][1])
    assert gap == max(days, 1)


def test_the_datasets_own_horizon_counts_first():
    task = make()
    task["dataset"]["horizon"] = 9
    first = roll(20)(task)[0]
    assert row(segments(first)["test"][0]) - row(segments(first)["valid"][1]) == 9


@pytest.mark.parametrize("kind", ["expanding", "sliding"])
@pytest.mark.parametrize("days", [None, 0, 4])
def test_no_training_label_is_known_only_in_the_test(kind, days):
    """The samples themselves: cut by the generator, purged by the dataset, never twice."""
    from qtorch import init_instance_by_config

    horizon = 2
    closest = {"train": ["2018-06-01", "2019-03-29"], "test": ["2019-04-01", "2019-07-31"]}
    plain_handler = {"_target_": "qtorch.data.DataHandlerLP", "source": SOURCE}
    fields = {"feature": ["$close"], "label": ["Ref($close, -2)/Ref($close, -1) - 1"]}
    plain_handler["data_loader"] = {"_target_": "qtorch.data.QlibDataLoader", "config": fields}
    task = make(segments=closest)
    task["dataset"]["handler"] = {**plain_handler, "instruments": "stocks"}
    for each in roll(30, kind, trunc_days=days)(task):
        dataset = init_instance_by_config(each["dataset"])
        dates = dataset.samples("train").index.get_level_values("datetime")
        test = row(segments(each)["test"][0])
        last = row(dates.max())
        assert last + horizon < test
        expected = min(row(segments(each)["train"][1]), test - horizon - 1)
        assert last == expected  # not one day fewer


# -- what follows the segments ---------------------------------------------------------------------


def test_fit_windows_keep_their_place_in_the_train_segment():
    processor = {"class": "ZScoreNorm", "kwargs": {"fit_start_time": "2018-02-01"}}
    processor["kwargs"]["fit_end_time"] = "2018-12-28"
    task = make(
        "class",
        fit_start_time="2018-02-05",
        fit_end_time="2018-12-31",
        infer_processors=[processor],
    )
    for kind in ("expanding", "sliding"):
        for each in roll(20, kind)(task):
            train, given = segments(each)["train"], handler(each)
            own = given["infer_processors"][0]["kwargs"]
            assert row(given["fit_start_time"]) - row(train[0]) == 2
            assert given["fit_end_time"] == train[1]
            assert own["fit_start_time"] == train[0]
            assert row(own["fit_end_time"]) == row(train[1]) - 1


def test_a_fit_window_stays_inside_the_cut_segment_unless_it_may_be_wide():
    task = make(fit_start_time="2018-01-01", fit_end_time="2019-03-29")
    first = roll(20)(task)[0]
    assert handler(first)["fit_start_time"] == segments(first)["train"][0]
    assert handler(first)["fit_end_time"] == segments(first)["train"][1]
    wide = roll(20)(make(**{**handler(task), "allow_wide_fit": True}))
    assert handler(wide[0])["fit_end_time"] == "2019-03-29"
    assert row(handler(wide[1])["fit_end_time"]) == row("2019-03-29") + 20


def test_the_handlers_end_moves_only_where_it_has_to():
    ends = [handler(t)["end_time"] for t in roll(40)(make(end_time="2019-07-31"))]
    tests = [segments(t)["test"][1] for t in roll(40)(make())]
    assert ends == ["2019-07-31" if t <= "2019-07-31" else t for t in tests]
    assert {handler(t).get("end_time") for t in roll(40)(make())} == {None}
    kept = roll(40, ds_extra_mod_func=None)(make(end_time="2019-07-31"))
    assert {handler(t)["end_time"] for t in kept} == {"2019-07-31"}


def test_a_function_of_ones_own_sees_task_and_generator():
    def note(task, generator):
        task["note"] = generator.ta.cal_interval(segments(task)["test"][0], "2019-04-01")

    assert [t["note"] for t in roll(50, ds_extra_mod_func=note)(make())] == [0, 50, 100, 150]


def test_a_live_handler_is_shared_where_the_copy_shares_it():
    from qtorch import init_instance_by_config

    task = make()
    live = init_instance_by_config(task["dataset"]["handler"])
    task["dataset"]["handler"] = live
    tasks = roll(40, task_copy_func=copy.copy)(task)
    assert all(t["dataset"]["handler"] is live for t in tasks)
    assert task["dataset"]["segments"] == SEGMENTS
    gap = row(segments(tasks[0])["test"][0]) - row(segments(tasks[0])["valid"][1])
    assert gap == 2  # the live handler knows its label too


def test_the_calendar_is_that_of_the_tasks_source():
    assert RollingGen(40)(make()) == roll(40)(make())


def test_following_tasks_go_on_where_one_ended():
    generator = roll(20)
    tasks = generator(make())
    assert list(generator.gen_following_tasks(tasks[2], "2019-10-31")) == tasks[3:]


# -- misuse ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [({"rtype": "expandin"}, "Did you mean 'expanding'"), ({"step": 0}, "at least one")],
)
def test_wrong_arguments(options, said):
    with pytest.raises(ConfigError, match=said):
        roll(**options)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train": 0.6, "valid": 0.2, "test": 0.2}, "two dates"),
        ({"train": ["2018-02-01", "2018-12-31"]}, "unknown segment 'test'"),
        ({**SEGMENTS, "test": [None, "2019-10-31"]}, "needs a start"),
        ({**SEGMENTS, "valid": ["2019-03-29", "2019-03-29"]}, "no day left"),
    ],
)
def test_segments_that_cannot_be_rolled(change, said):
    with pytest.raises(ConfigError, match=said):
        roll(20, trunc_days=5)(make(segments=change))


def test_a_live_dataset_cannot_be_rolled():
    with pytest.raises(ConfigError, match="a live object"):
        roll(20)({"model": {}, "dataset": object()})


# -- generators together ---------------------------------------------------------------------------


class Seeds(TaskGen):
    def generate(self, task):
        return [{**task, "seed": seed} for seed in range(3)]


class Horizons(MultiHorizonGenBase):
    def set_horizon(self, task, hr):
        task["dataset"]["handler"]["label"] = [f"Ref($close, -{hr + 1})/Ref($close, -1) - 1"]


def test_generators_multiply():
    one, other = make(), make(end_time="2019-11-29")
    windows = len(roll(40)(one))
    tasks = task_generator([one, other], [Seeds(), roll(40)])
    assert len(tasks) == 2 * 3 * windows
    assert [t["seed"] for t in tasks[: 3 * windows]] == [
        s for s in range(3) for _ in range(windows)
    ]
    assert task_generator(one, Seeds()) == Seeds()(one)
    assert task_generator([], Seeds()) == []


def test_horizons_set_the_label_and_cut_as_far():
    task = make()
    before = copy.deepcopy(task)
    made = Horizons((1, 10), calendar=DAYS)(task)
    assert task == before
    for each, horizon in zip(made, (1, 10), strict=True):
        found = segments(each)
        assert row(found["test"][0]) - row(found["valid"][1]) >= horizon + 2
        assert f"-{horizon + 1}" in handler(each)["label"][0]
    assert row(segments(made[1])["test"][0]) - row(segments(made[1])["valid"][1]) == 12
