"""Numbers of things in words."""

from qtorch.core.wording import counted


def test_the_words_go_with_the_number():
    assert counted(1, "task") == "1 task"
    assert counted(0, "task") == "0 tasks"
    assert counted(1200, "entry", "entries") == "1,200 entries"
    assert counted(1, "task is removed", "tasks are removed") == "1 task is removed"
