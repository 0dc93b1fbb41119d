"""The model of stop signals: which signal means what, and who handles it."""

from __future__ import annotations

import signal
import threading

import pytest

from qtorch.process import stops
from qtorch.process.stops import (
    STOP_SIGNALS,
    CommandLock,
    StopSignals,
    interrupt_work,
    is_command_stopped,
    received_signals,
    send_stop_signal,
    stop_name,
)


def test_later_signals_of_a_scheduler_mean_the_same_as_the_first():
    calls = []
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopSignals(calls.append, lambda: calls.append("again")):
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.raise_signal(number)
    assert calls == [signal.SIGUSR1, "again"]
    assert received_signals == [
        signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
    ]  # fmt: skip
    assert handlers == [signal.getsignal(number) for number in STOP_SIGNALS]


def test_inner_handler_knows_the_signals_of_the_outer_one():
    inner_calls = []
    with StopSignals(lambda number: None):
        signal.raise_signal(signal.SIGTERM)
        with StopSignals(inner_calls.append, lambda: inner_calls.append("again")):
            assert received_signals == [signal.SIGTERM]
            signal.raise_signal(signal.SIGINT)
    assert inner_calls == ["again"]
    with StopSignals(lambda number: None):  # the next command
        assert received_signals == []


def test_other_threads_do_not_change_the_handlers():
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    signals = StopSignals(lambda number: None)
    thread = threading.Thread(target=signals.install)
    thread.start()
    thread.join()
    assert not signals.is_installed
    assert handlers == [signal.getsignal(number) for number in STOP_SIGNALS]


def test_stop_from_a_thread_interrupts_the_work_once():
    with StopSignals(interrupt_work, ignores_interrupts=True):
        with pytest.raises(KeyboardInterrupt):
            threading.Thread(target=send_stop_signal).start()
            threading.Event().wait(10)
        send_stop_signal()
        signal.raise_signal(signal.SIGINT)
    assert received_signals == [signal.SIGTERM]


def test_stop_is_named_after_the_signal_that_the_parent_received(monkeypatch):
    monkeypatch.setattr(stops, "_parent_signals", [])
    assert [stop_name(number) for number in STOP_SIGNALS] == ["Ctrl-C", "SIGTERM", "SIGUSR1"]
    names = []
    for number in (signal.SIGINT, 0):
        with StopSignals(lambda number: names.append(stop_name(number))):
            send_stop_signal(number)  # the process itself gets SIGTERM
    assert names == ["Ctrl-C", "the command's request to stop"]


def test_command_lock():
    lock = CommandLock()
    assert not is_command_stopped(lock.path)
    assert not is_command_stopped(lock.path)
    lock.release()
    assert is_command_stopped(lock.path)
    lock.close()
    assert not is_command_stopped(None)
    assert not is_command_stopped(lock.path)  # the command has ended, or runs on another machine
