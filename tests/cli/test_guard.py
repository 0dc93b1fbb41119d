"""How a command ends."""

from __future__ import annotations

import errno

import pytest

from qtorch.cli.guard import error_line, guarded
from qtorch.cli.main import main
from qtorch.core.errors import DataError, ExpressionError
from qtorch.data.expression import parse


def raising(error):
    def command(argv):
        raise error

    return command


def test_our_errors_are_one_line_without_a_traceback(capsys):
    assert guarded(raising(DataError("no folder\n  here")), []) == 1
    assert capsys.readouterr().err == "error: no folder here\n"


def test_ours_is_told_where_another_library_wrapped_it():
    wrapping = RuntimeError("Error in call to target")
    wrapping.__cause__ = DataError("ours")
    assert error_line(wrapping) == "ours"


def test_an_error_that_is_not_ours_names_its_type_and_how_to_see_more():
    line = error_line(ZeroDivisionError("division by zero"))
    assert line == "ZeroDivisionError: division by zero (QTORCH_DEBUG=1 shows where)"


def test_a_full_disk_is_called_so():
    told = error_line(OSError(errno.ENOSPC, "No space left on device", "/x/y.parquet"))
    assert told.startswith("the disk is full while writing /x/y.parquet")


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("Ref($close,-2)/Reff($close,-1)", ": 'Reff', character 16 of 'Ref($close,-2)/Reff($c"),
        ("Mean($close, 5", ": '(', character 5 of 'Mean($close, 5'"),
        ("$close +", "was expected: the end of '$close +'"),
    ],
)
def test_the_place_in_an_expression_is_said_in_words(expression, said):
    with pytest.raises(ExpressionError) as caught:
        parse(expression)
    line = error_line(caught.value)
    assert said in line
    assert "^" not in line


def test_debug_shows_the_traceback_for_this_command_alone(capsys, monkeypatch):
    monkeypatch.delenv("QTORCH_DEBUG", raising=False)
    assert guarded(raising(DataError("ours")), ["--debug", "a=1"]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert guarded(raising(DataError("ours")), ["a=1"]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_an_interruption_has_its_own_exit_code(capsys):
    assert guarded(raising(KeyboardInterrupt("Resume it with: x")), []) == 130
    assert "Resume it with: x" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        ([], 2, "usage: qtorch"),
        (["--help"], 0, "usage: qtorch"),
        (["--version"], 0, "qtorch 0."),
        (["trian"], 2, "Did you mean 'train'?"),
        (["data"], 2, "qtorch data describe"),
        (["data", "--help"], 0, "qtorch data import"),
        (["data", "imprt"], 1, "Did you mean 'import'?"),
        (["predict", "--help"], 0, "run=RUN_ID"),
        (["predict", "out=x.parquet"], 1, "run must be given"),
        (["predict", "run=x", "out=x.xlsx"], 1, ".parquet or .csv"),
        (["predict", "rum=x"], 1, "Did you mean 'run'?"),
        (["predict", "nonsense"], 1, "is no override"),
        (["tracking"], 2, "qtorch tracking send"),
        (["tracking", "sent"], 1, "Did you mean 'send'?"),
        (["data", "import", "out=x", "data=synthetc"], 1, "Did you mean 'synthetic'?"),
        (["data", "import", "--config-dir", "nowhere"], 1, "there is no folder 'nowhere'"),
    ],
)
def test_what_the_commands_say(argv, code, said, capsys):
    assert main(argv) == code
    told = capsys.readouterr()
    assert said in told.out + told.err
    if code == 1:
        assert told.err.count("\n") == 1
