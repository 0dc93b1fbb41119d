"""Tests of Hydra's sweep syntax as a search space."""

from __future__ import annotations

import pytest

from qtorch.cli.launchers.optuna_sweeper import parse_search
from qtorch.core.errors import ConfigError
from qtorch.study.search.trial import Choice, Span


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("32,64,128", Choice(("32", "64", "128"))),
        ("choice(gru,lstm,gru)", Choice(("gru", "lstm"))),
        ("[1,2],null,'a b'", Choice(("[1,2]", "null", "'a b'"))),
        ("interval(0.1,0.5)", Span(0.1, 0.5)),
        ("int(interval(1,9))", Span(1, 9, integer=True)),
        ("tag(log, interval(1e-4, 1e-2))", Span(1e-4, 1e-2, log=True)),
        ("tag(log,int(interval(8,256)))", Span(8, 256, integer=True, log=True)),
        ("range(1,4)", Span(1, 3, integer=True, step=1)),
        ("range(0,10,4)", Span(0, 8, integer=True, step=4)),
        ("range(0.0,0.5,0.1)", Span(0.0, 0.4, step=0.1)),
        ("tag(log,range(1,65))", Span(1, 64, integer=True, log=True)),
    ],
)
def test_every_sweep_form_is_parsed(text, part):
    search = parse_search([f"x={text}", "seed=1"], None)
    assert search.space == {"x": part}
    assert search.fixed == ("seed=1",)


def test_point_of_the_space_gives_job_overrides():
    search = parse_search(
        ["+x=interval(0,1)", "model=gru,lstm", "~record", "hydra.verbose=true"], None
    )
    overrides = search.overrides({"+x": 0.125, "model": "lstm"})
    assert overrides == ["~record", "+x=0.125", "model=lstm"]


def test_command_overrides_params_of_a_file():
    params = {"lr": "tag(log, interval(1e-4, 1e-2))", "size": "32,64"}
    search = parse_search(["size=16"], params)
    assert search.space == {"lr": Span(1e-4, 1e-2, log=True)}
    assert search.fixed == ("size=16",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3", "no space"),
        ("interval(2,1)", "is empty"),
        ("tag(log, interval(0, 1))", "must start above 0"),
        ("tag(lag, interval(1, 2))", "Did you mean 'log'"),
        ("tag(log, choice(1, 2))", "is valid for interval and range"),
        ("range(5,1)", "is empty or decreasing"),
        ("tag(log,range(1,9,2))", "a step of 1"),
    ],
)
def test_invalid_search_spaces_are_rejected(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_search([f"x={text}"], None)


def test_grid_of_discrete_dimensions():
    assert Span(0.0, 0.4, step=0.1).grid() == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert Span(1, 3, integer=True).grid() == [1, 2, 3]
    assert Span(0.0, 1.0).grid() is None
