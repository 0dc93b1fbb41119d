"""Counts with a noun in singular or plural."""

from qtorch.core.errors import format_count


def test_noun_agrees_with_the_number():
    assert format_count(1, "task") == "1 task"
    assert format_count(0, "task") == "0 tasks"
    assert format_count(1200, "entry", "entries") == "1,200 entries"
    assert format_count(1, "task is removed", "tasks are removed") == "1 task is removed"
