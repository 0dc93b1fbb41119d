"""Tests of error messages and exit codes of the commands."""

from __future__ import annotations

import errno
import logging

import pytest

from qtorch.cli.guard import error_line, run_command
from qtorch.cli.main import main
from qtorch.core.errors import DataError, ExpressionError
from qtorch.core.runtime import configure_logging
from qtorch.data.expression import parse


def failing_command(error):
    def command(argv):
        raise error

    return command


def test_qtorch_errors_are_one_line_without_traceback(capsys):
    assert run_command(failing_command(DataError("no folder\n  here")), []) == 1
    assert capsys.readouterr().err == "error: no folder here\n"


def test_wrapped_qtorch_error_is_shown():
    wrapping = RuntimeError("Error in call to target")
    wrapping.__cause__ = DataError("ours")
    assert error_line(wrapping) == "ours"


def test_suppressed_qtorch_error_is_not_shown():
    with pytest.raises(ZeroDivisionError) as raised:
        try:
            raise DataError("ours")
        except DataError:
            raise ZeroDivisionError("theirs") from None
    assert error_line(raised.value).startswith("ZeroDivisionError: theirs")


@pytest.mark.parametrize("options", [[], ["--debug"]])
def test_errors_are_shown_without_secrets(capsys, options):
    error = RuntimeError("cannot open postgresql://me:hunter/2@host/db?password=hunter/2")
    error.__cause__ = KeyError("https://hunter2@host")
    assert run_command(failing_command(error), options) == 1
    output = capsys.readouterr().err
    assert "postgresql://me:***@host/db?password=***" in output
    assert "hunter" not in output


def test_log_is_written_without_secrets(capsys):
    configure_logging()
    log = logging.getLogger("qtorch.test")
    log.warning("%s does not answer", "http://me:s3cret@host")
    url = "http://me:s3cret@host"
    try:
        raise ValueError(url)
    except ValueError:
        log.exception("failed")
    output = capsys.readouterr().err
    assert "s3cret" not in output
    assert output.count("http://me:***@host") == 2


def test_null_for_a_config_group(capsys):
    assert main(["train", "debug=null", "seed=0"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: debug=null: an option of a config group cannot be null.")


def test_other_errors_show_their_type_and_a_debug_hint():
    line = error_line(ZeroDivisionError("division by zero"))
    assert line == "ZeroDivisionError: division by zero (set QTORCH_DEBUG=1 for the traceback)"


def test_full_disk_message():
    line = error_line(OSError(errno.ENOSPC, "No space left on device", "/x/y.parquet"))
    assert line.startswith("the disk is full while writing /x/y.parquet")


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("Ref($close,-2)/Reff($close,-1)", ": 'Reff', character 16 of 'Ref($close,-2)/Reff($c"),
        ("Mean($close, 5", ": '(', character 5 of 'Mean($close, 5'"),
        ("$close +", "was expected: the end of '$close +'"),
    ],
)
def test_position_in_an_expression_is_described_in_words(expression, message):
    with pytest.raises(ExpressionError) as error:
        parse(expression)
    line = error_line(error.value)
    assert message in line
    assert "^" not in line


def test_debug_shows_the_traceback_of_one_command_only(capsys, monkeypatch):
    monkeypatch.delenv("QTORCH_DEBUG", raising=False)
    assert run_command(failing_command(DataError("ours")), ["--debug", "a=1"]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert run_command(failing_command(DataError("ours")), ["a=1"]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_interruption_has_its_own_exit_code(capsys):
    assert run_command(failing_command(KeyboardInterrupt("Resume it with: x")), []) == 130
    assert "Resume it with: x" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "code", "message"),
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
        (["predict", "nonsense"], 1, "invalid override"),
        (["train", "--model", "gru"], 1, "KEY=VALUE without dashes, such as model=gru"),
        (["train", "--lr=3"], 1, "KEY=VALUE without dashes, such as model.optimizer.lr=3"),
        (
            ["train", "--multirun", "--cfg", "job"],
            1,
            "--cfg shows one job, so leave out --multirun",
        ),
        (["train", "-m", "-c", "job", "seed=0,1"], 1, "-m and -c exclude each other"),
        (
            ["train", "seed=0,1", "--multi", "--info"],
            1,
            "--info shows one job, so leave out --multi",
        ),
        (["train", "--run", "--cfg=job"], 1, "--run and --cfg exclude each other"),
        (["train", "model", "gru"], 1, "KEY=VALUE without spaces around =, such as model=gru"),
        (["train", "seed", "=", "1"], 1, "such as seed=1"),
        (["train", "-cd", "conf", "seed"], 1, "invalid override 'seed'"),
        (["train", "max_epochs=3"], 1, "Did you mean trainer.max_epochs?"),
        (["train", "model.hidden_size=3"], 1, "Did you mean model.network.hidden_size?"),
        (["train", "network.hidden_size=3"], 1, "Did you mean model.network.hidden_size?"),
        (["train", "nothing.here=3"], 1, "the configuration has no 'nothing'. (To add"),
        (["train", "seed=0,1"], 1, "for a list write 'seed=[0,1]', for text 'seed=\"0,1\"', for"),
        (["report", "runs=a,b"], 1, "for a list write 'runs=[a,b]', for text 'runs=\"a,b\"'."),
        (["tracking"], 2, "qtorch tracking send"),
        (["tracking", "sent"], 1, "Did you mean 'send'?"),
        (["data", "import", "out=x", "data=synthetc"], 1, "Did you mean 'synthetic'?"),
        (["data", "import", "--config-dir", "nowhere"], 1, "folder 'nowhere' does not exist"),
    ],
)
def test_command_messages_and_exit_codes(argv, code, message, capsys):
    assert main(argv) == code
    output = capsys.readouterr()
    assert message in output.out + output.err
    if code == 1:
        assert output.err.count("\n") == 1


@pytest.mark.parametrize("words", [["--debug", "train", "-x"], ["train", "-x", "--debug"]])
def test_the_switch_for_tracebacks_may_stand_first_or_last(words, capsys):
    assert main(words) == 1
    assert "Traceback" in capsys.readouterr().err
