"""Stored forms of values: other versions of qtorch must read them and compute the same hashes."""

from __future__ import annotations

import datetime
import enum
import functools
import json
from collections import OrderedDict, namedtuple
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch.core.configured import plain_value
from qtorch.core.identity import canonical_json, digest, fit_id, task_id
from qtorch.task.definition import encode_definition, encode_result, query_token
from qtorch.tracking.lossless_json import NotPlainError, decode, encode
from qtorch.trainer.run import loggable_task

Span = namedtuple("Span", "start end")


class Color(str, enum.Enum):  # noqa: UP042 - a StrEnum would be written differently by str()
    RED = "red"


CONFIG = {
    "model": {
        "class": "LSTM",
        "module_path": "a.b",
        "kwargs": {
            "x": (1, 2.0, -0.0, 1e300),
            "inner": {"class": "Inner", "kwargs": {"class": "y"}},
            "deep": [{"func": "a.f"}, {"class": "C", "other": 1}],
        },
    },
    "dates": [
        datetime.date(2020, 1, 2),
        datetime.datetime(2020, 1, 2),
        datetime.datetime(2020, 1, 2, 9, 30),
        pd.Timestamp("2020-01-03"),
        pd.Timestamp("2020-01-03 10:00", tz="UTC"),
    ],
    "scalars": [
        *(None, True, 1, 1.5, "é", np.int64(3), np.float64(0.1), np.float32(0.5)),
        *(np.bool_(True), np.str_("s"), Color.RED),
    ],
    "path": Path("a/b"),
    "span": slice("2020", pd.Timestamp("2021-01-01")),
    "named": Span(1, [2]),
    "ordered": OrderedDict(b=1, a={3: 4, None: 5}),
    "optimizer": functools.partial(torch.optim.Adam, 0.1, betas=(0.9, 0.99)),
    "cls": torch.nn.Linear,
    "function": torch.nn.functional.mse_loss,
}
PLAIN = {
    "model": {
        "class": "LSTM",
        "module_path": "a.b",
        "kwargs": {
            "x": [1, 2.0, -0.0, 1e300],
            "inner": {"class": "Inner", "kwargs": {"class": "y"}},
            "deep": [{"func": "a.f"}, {"class": "C", "other": 1}],
        },
    },
    "dates": [
        "2020-01-02",
        "2020-01-02",
        "2020-01-02T09:30:00",
        "2020-01-03",
        "2020-01-03T10:00:00+00:00",
    ],
    "scalars": [None, True, 1, 1.5, "é", 3, 0.1, 0.5, True, "s", "red"],
    "path": "a/b",
    "span": ["2020", "2021-01-01"],
    "named": [1, [2]],
    "ordered": {"b": 1, "a": {"3": 4, "None": 5}},
    "optimizer": {
        "_target_": "torch.optim.adam.Adam",
        "_partial_": True,
        "_args_": [0.1],
        "betas": [0.9, 0.99],
    },
    "cls": "torch.nn.modules.linear.Linear",
    "function": "torch.nn.functional.mse_loss",
}
CANONICAL = (
    '{"cls":"torch.nn.modules.linear.Linear","dates":["2020-01-02","2020-01-02",'
    '"2020-01-02T09:30:00","2020-01-03","2020-01-03T10:00:00+00:00"],'
    '"function":"torch.nn.functional.mse_loss","model":{"_target_":"a.b.LSTM",'
    '"deep":[{"_target_":"a.f"},{"class":"C","other":1}],"inner":{"_target_":"Inner",'
    '"class":"y"},"x":[1,2.0,-0.0,1e+300]},"named":[1,[2]],"optimizer":{"_args_":[0.1],'
    '"_partial_":true,"_target_":"torch.optim.adam.Adam","betas":[0.9,0.99]},'
    '"ordered":{"a":{"3":4,"None":5},"b":1},"path":"a/b",'
    '"scalars":[null,true,1,1.5,"é",3,0.1,0.5,true,"s","red"],"span":["2020","2021-01-01"]}'
)
HASH = "f50f491bcc0fd3ea017ae0a88a451f38"


def test_configuration_has_the_recorded_plain_form_and_hashes():
    assert json.dumps(plain_value(CONFIG)) == json.dumps(PLAIN)  # compares the order of keys too
    assert canonical_json(CONFIG) == canonical_json(PLAIN) == CANONICAL
    assert digest(CONFIG) == task_id(CONFIG) == HASH
    handler = {"cache": 2, "processors": [{"source": 3}]}
    task = {**CONFIG, "dataset": {"source": 1, "handler": handler}}
    assert fit_id(task, "data") == "de1be5fbf19aa67a62ba36831256002e"


def test_definition_of_a_pool_has_the_recorded_text_hash_and_tokens():
    definition = encode_definition(CONFIG)
    assert definition.text == json.dumps(PLAIN)
    assert definition.hash == HASH
    assert len(definition.tokens) == 34
    assert (definition.tokens[0], definition.tokens[-1]) == ("139973cb46aa7101", "fd3375ca3e0867da")
    token = query_token("a.b", [1.0, {"x": 2.0}])
    assert token == query_token("a.b", (1, {"x": 2})) == "6b3bd6e489fe0abc"


def test_result_of_a_task_has_the_recorded_text():
    result = {
        "a": (1, np.int64(2), np.float64(0.5)),
        "d": datetime.datetime(2020, 1, 2),
        "t": pd.Timestamp("2020-01-03"),
        "p": Path("x"),
        3: [True, None, float("nan")],
    }
    assert encode_result(result) == (
        '{"a": [1, 2, 0.5], "d": "2020-01-02T00:00:00", "t": "2020-01-03T00:00:00", "p": "x", '
        '"3": [true, null, NaN]}'
    )


ARTIFACTS = [
    ((1, (2, [])), {"$tuple": [1, {"$tuple": [2, []]}]}),
    ({3, 1, 2, (1, 2)}, {"$set": ["set", 1, 2, 3, {"$tuple": [1, 2]}]}),
    (frozenset({"b", "a"}), {"$set": ["frozenset", "a", "b"]}),
    ({1: 2, (1, 2): {"x": None}}, {"$dict": [[1, 2], [{"$tuple": [1, 2]}, {"x": None}]]}),
    ({"$tuple": 1, "b": {}}, {"$dict": [["$tuple", 1], ["b", {}]]}),
    ([float("inf"), -float("inf"), -0.0], [{"$float": "inf"}, {"$float": "-inf"}, -0.0]),
    ([np.float32(0.5), np.int8(1), np.bool_(False)], [0.5, 1, False]),
    (
        pd.Timestamp("2020-01-02 03:04", tz="Asia/Shanghai"),
        {"$timestamp": ["2020-01-02T03:04:00", "us", "Asia/Shanghai"]},
    ),
    (pd.Timedelta("2h").as_unit("s"), {"$timedelta": [7200, "s"]}),
    ({"a": datetime.date(2020, 1, 2)}, {"a": {"$date": "2020-01-02"}}),
    (datetime.datetime(2020, 1, 2, 3), {"$datetime": "2020-01-02T03:00:00"}),
]


@pytest.mark.parametrize(("value", "tree"), ARTIFACTS)
def test_artifact_has_the_recorded_json_and_is_read_back(value, tree):
    assert encode(value) == tree
    json.dumps(tree, allow_nan=False)
    assert decode(tree) == value
    assert decode(encode([{"deep": value}])) == [{"deep": value}]


def test_artifact_keeps_nan_and_nat():
    assert encode([float("nan"), pd.NaT]) == [{"$float": "nan"}, {"$timestamp": "NaT"}]
    number, stamp = decode(encode([float("nan"), pd.NaT]))
    assert np.isnan(number)
    assert stamp is pd.NaT


@pytest.mark.parametrize("value", [OrderedDict(a=1), Span(1, 2), Path("x"), object(), Color.RED])
def test_artifact_is_not_json_if_reading_would_change_its_type(value):
    with pytest.raises(NotPlainError, match=f"{type(value).__qualname__} is not plain data"):
        encode([value])


def test_params_of_a_run_name_live_objects():
    task = {
        "model": {"a": (1, Path("x"), torch.nn.Linear, 3.5, None)},
        5: Fraction(1, 2),
        "f": len,
    }
    assert loggable_task(task) == {
        "model": {"a": [1, "<PosixPath>", "Linear", 3.5, None]},
        "5": "<Fraction>",
        "f": "len",
    }
