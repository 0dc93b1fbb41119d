"""Words of users that look like markup or like a terminal's commands, in all tables and lines."""

from __future__ import annotations

import io
import logging
import sys
from types import SimpleNamespace

import pytest
from rich.text import Text

from qtorch.cli import replay, rolling
from qtorch.cli.guard import error_line
from qtorch.cli.main import main
from qtorch.cli.tables import console as console_tables
from qtorch.cli.tables import jobs, tasks, trials
from qtorch.core.errors import QtorchError, printable_text
from qtorch.core.runtime import configure_logging, progress
from qtorch.core.terminal import Terminal
from qtorch.study.replay import Difference, Guarantee, ResultCheck
from qtorch.study.search.trial import TrialRow
from qtorch.study.sweep import JobResult, SeedGroup
from qtorch.task import TaskManager
from qtorch.task.worker import SlotStatus

COMMANDS = "\x1b]0;title\x07\x1b[2J\x1b[31m\r\x9b2J\x08\x7f\u202e"
WORDS = ("[red]", "[/]", "[link=http://x]y[/link]", "\\[", "[bold", ":warning:", "a[0]", "[/red]")


def nasty(k: int) -> str:
    """Return the k-th word, in the midst of a terminal's commands."""
    return f"w{k}{COMMANDS}{WORDS[k % len(WORDS)]}"


def one_word(k: int) -> str:
    """Return the k-th word without the carriage return, at which a table may break it."""
    return nasty(k).replace("\r", "")


def visible(k: int) -> str:
    """Return what is shown of that word."""
    return printable_text(nasty(k))


@pytest.fixture
def screen(monkeypatch):
    """The output of all consoles, on a wide terminal."""
    output = io.StringIO()

    def terminal() -> Terminal:
        return Terminal(width=1000, file=output, force_terminal=True, color_system=None)

    for module in (console_tables, jobs, tasks, trials):
        monkeypatch.setattr(module, "terminal", terminal)
    return output


def assert_words_appear(output: str, numbers: range) -> None:
    text = output.replace("\n", " ")
    missing = [visible(k) for k in numbers if visible(k) not in text]
    assert not missing, text
    assert text == printable_text(text)


def test_printable_text_has_no_commands_and_keeps_words():
    assert printable_text("a\tb\nc ä 中 \U0001f600") == "a\tb\nc ä 中 \U0001f600"
    assert printable_text(f"a{COMMANDS}b") == "a]0;title[2J[31m2Jb"
    assert printable_text("\udcff").encode() == "\ufffd".encode()


def test_terminal_renders_styles_but_no_markup():
    output = io.StringIO()
    console = Terminal(file=output, force_terminal=True, color_system="standard", width=80)
    words = (Text("styled", style="red"), "[red]", "\x1b[32m:warning:\x1b[0m", Text("\x1b[1m"))
    console.print(*words, highlight=False)
    text = output.getvalue()
    assert "\x1b[31mstyled\x1b[0m" in text
    assert "[red]" in text
    assert ":warning:" in text
    assert "\x1b[32m" not in text


def test_table_of_jobs_and_seeds(screen):
    results = [
        JobResult(
            k, [one_word(3 * k)], "FINISHED", run_id=nasty(3 * k + 1), note=nasty(3 * k + 2),
            metrics={"test.IC": 0.1, "test.Rank IC": 0.2}, setting=f"s{k // 2}",
        )
        for k in range(4)
    ]  # fmt: skip
    jobs.print_sweep(nasty(12), results, command=nasty(13))
    jobs.print_sweep(nasty(13), [])
    console_tables.print_table(jobs._groups_table([SeedGroup(one_word(14), results)]))
    assert_words_appear(screen.getvalue(), range(15))


def test_summary_of_a_run(screen, monkeypatch):
    task = {"dataset": {"handler": {"instruments": nasty(0)}, "segments": {nasty(1): "2020"}}}
    stored = {"task": task}
    recorder = SimpleNamespace(
        load_object=stored.get, list_artifacts=lambda: ["task"], experiment_id="1"
    )
    monkeypatch.setattr(jobs, "load_if_present", lambda recorder, name: None)
    jobs.print_summary(JobResult(0, [], "FINISHED", run_id=nasty(2), experiment=nasty(3)), recorder)
    assert_words_appear(screen.getvalue(), range(4))


def test_table_of_trials(screen):
    rows = [
        TrialRow(number=0, state="COMPLETE", value=0.5, params={nasty(0): nasty(1)}, steps=1,
                 run_id=nasty(2), error=None, replaced=False),
        TrialRow(number=1, state=nasty(3), value=None, params={}, steps=0, run_id=None,
                 error=nasty(4), replaced=False),
    ]  # fmt: skip
    study = SimpleNamespace(name=nasty(5), direction="maximize")
    trials._print_trials(study, rows, nasty(6), {nasty(7): 1.0}, maximize=True)
    assert_words_appear(screen.getvalue(), range(8))


def test_tables_of_tasks(screen, tmp_path, capsys):
    manager = TaskManager(nasty(0), f"sqlite:///{tmp_path}/tasks.db")
    manager.create_task([{"model": nasty(1).replace(".", ""), "seed": nasty(2)}, {"seed": 1}])
    manager.fail_task(manager.fetch_task(), nasty(3), nasty(4))
    manager.renew(manager.fetch_task(), progress={"stage": nasty(5), "metrics": {nasty(6): 1}})
    all_tasks = list(manager.query(decode=False))
    tasks.print_tasks(all_tasks)
    for task in all_tasks:
        tasks.print_task(task)
    progress = {"stage": nasty(7), "epoch": nasty(8), "metrics": {nasty(9): "x"}}
    slot = SlotStatus(nasty(10), nasty(11), all_tasks[1], progress=progress)
    console_tables.print_table(tasks.worker_table(nasty(12), [slot]))
    assert_words_appear(screen.getvalue(), range(1, 13))
    assert main(["tasks", "list", f"url={manager.url}"]) == 0
    assert visible(0) in capsys.readouterr().out
    manager.close()


def test_result_of_a_replay(screen):
    run, original = SimpleNamespace(id=nasty(0)), SimpleNamespace(id=nasty(1))
    result = SimpleNamespace(
        run=run, original=original, equal=False, strongest_guarantee="none", unknown=[nasty(2)],
        guarantee=Guarantee("tolerance", nasty(8)),
        checks=[ResultCheck(nasty(3), equal, nasty(4)) for equal in (True, False, None)],
        differences=[Difference(nasty(5), nasty(6), nasty(7))],
    )  # fmt: skip
    replay._print_result(result)
    assert_words_appear(screen.getvalue(), range(9))


def test_result_of_a_rolling_study(screen, monkeypatch):
    monkeypatch.setattr("qtorch.task.rolling.task_segments", lambda task: task)
    recorder = SimpleNamespace(id=nasty(0), list_metrics=dict)
    result = SimpleNamespace(
        tasks=[{"train": [nasty(1)[:10]], "test": ["2020"]}],
        windows=[recorder], window_metrics=[{}], recorder=recorder,
    )  # fmt: skip
    rolling._print_result(result, 1.0)
    assert_words_appear(screen.getvalue(), range(1))


def test_description_of_bars(monkeypatch, capsys):
    figure = SimpleNamespace(savefig=lambda path, dpi: None)
    description = SimpleNamespace(text=lambda: nasty(0), plot=lambda: figure)
    monkeypatch.setattr("qtorch.data.describe.describe", lambda source, **options: description)
    assert main(["data", "describe", "data=synthetic"]) == 0
    assert visible(0) in capsys.readouterr().out


def test_errors_are_one_line_without_commands():
    for error in (QtorchError(nasty(0)), FileNotFoundError(2, "no file", nasty(0))):
        text = error_line(error)
        assert "[red]" in text
        assert text == printable_text(text).replace("\n", " ")


def error_screen(monkeypatch):
    """Replace stderr by a terminal, and return that."""
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "300")
    return stream


def test_log_on_a_terminal(monkeypatch):
    screen = error_screen(monkeypatch)
    configure_logging("INFO")
    logging.getLogger("qtorch.test").warning("%s %s", nasty(0), nasty(1))
    assert_words_appear(screen.getvalue(), range(2))


def test_progress_bars(monkeypatch):
    screen = error_screen(monkeypatch)
    monkeypatch.setattr("qtorch.core.runtime.SHOW_AFTER_SECONDS", -1.0)
    monkeypatch.setenv("TERM", "xterm")
    assert list(progress([1, 2], nasty(0))) == [1, 2]
    with tasks.show_progress(nasty(1)) as update:
        update({"running": 1, "failed": 1})
    text = screen.getvalue()
    assert visible(0) in text
    assert f"{visible(1)}, 1 running, 1 failed" in text
    assert "\x1b]0;" not in text
