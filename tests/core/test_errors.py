"""Parts of messages: suggested names, and counts with a noun in singular or plural."""

from qtorch.core.errors import format_count, nearest_name, unknown_name_message


def test_error_messages_suggest_the_nearest_name():
    assert nearest_name("LSMT", ["LSTM", "GRU"]) == "LSTM"
    assert nearest_name("lstm", ["LSTM", "GRU"]) == "LSTM"
    assert nearest_name("zebra", ["LSTM"]) is None
    assert "Valid names: none" in unknown_name_message("field", "x", [])
    assert "(20 in all)" in unknown_name_message("field", "x", [f"f{k}" for k in range(20)])


def test_noun_agrees_with_the_number():
    assert format_count(1, "task") == "1 task"
    assert format_count(0, "task") == "0 tasks"
    assert format_count(1200, "entry", "entries") == "1,200 entries"
    assert format_count(1, "task is removed", "tasks are removed") == "1 task is removed"
