"""Hydra's sweep syntax as a space: every form, and what cannot be searched."""

from __future__ import annotations

import pytest

from qtorch.cli.search_space import searched
from qtorch.core.errors import ConfigError
from qtorch.tracking.trials.space import Choice, Span


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
def test_each_form_is_a_part_of_the_space(text, part):
    found = searched([f"x={text}", "seed=1"], None)
    assert found.space == {"x": part}
    assert found.fixed == ("seed=1",)


def test_a_point_of_the_space_is_a_jobs_overrides():
    found = searched(["+x=interval(0,1)", "model=gru,lstm", "~record", "hydra.verbose=true"], None)
    made = found.overrides({"+x": 0.125, "model": "lstm"})
    assert made == ["~record", "+x=0.125", "model=lstm"]


def test_the_command_goes_before_a_files_params():
    params = {"lr": "tag(log, interval(1e-4, 1e-2))", "size": "32,64"}
    found = searched(["size=16"], params)
    assert found.space == {"lr": Span(1e-4, 1e-2, log=True)}
    assert found.fixed == ("size=16",)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("3", "no space"),
        ("interval(2,1)", "is empty"),
        ("tag(log, interval(0, 1))", "begins above 0"),
        ("tag(lag, interval(1, 2))", "Did you mean 'log'"),
        ("tag(log, choice(1, 2))", "goes with interval and range"),
        ("range(5,1)", "is empty or falls"),
        ("tag(log,range(1,9,2))", "steps of 1"),
    ],
)
def test_what_cannot_be_searched_is_told(text, told):
    with pytest.raises(ConfigError, match=told):
        searched([f"x={text}"], None)


def test_countable_parts_have_a_grid():
    assert Span(0.0, 0.4, step=0.1).grid() == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert Span(1, 3, integer=True).grid() == [1, 2, 3]
    assert Span(0.0, 1.0).grid() is None
