"""Jobs that meet at their fit: each runs in a thread of its own, one at a time."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Job(Generic[T]):
    """A function that runs until it ends or asks for a fit, then waits for the answer.

    Only one of all jobs and the caller runs at any time: `advance` lets the job run and returns
    when it waits or has ended. So jobs may use everything that a program with one thread may (the
    global random generators, the active run), and a job's own code needs no knowledge of the fleet.
    """

    def __init__(self, number: int, function: Callable[[], T]) -> None:
        self.number = number
        self.request: Any = None  # what the job waits for; None while it runs or after its end
        self.is_ended = False
        self.result: T | None = None
        self.error: BaseException | None = None
        self._function: Callable[[], T] | None = function
        self._context = contextvars.copy_context()
        self._thread: threading.Thread | None = None
        self._answer: Any = None
        self._may_run, self._has_stopped = threading.Semaphore(0), threading.Semaphore(0)

    def advance(self, answer: Any = None) -> None:
        """Let the job run until it waits or ends; `answer` is what it has waited for.

        An exception as the answer is raised in the job. Ctrl-C is raised here once the job waits or
        has ended.
        """
        self._answer, self.request = answer, None
        if self._thread is None:
            name = f"fleet job {self.number}"
            self._thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._thread.start()
        else:
            self._may_run.release()
        stop: KeyboardInterrupt | None = None
        while True:
            try:
                self._has_stopped.acquire()
                break
            except KeyboardInterrupt as error:
                stop = error
        if stop is not None:
            raise stop

    def request_answer(self, request: Any) -> Any:
        """Called in the job: make a request, wait, and return the answer."""
        self.request = request
        self._has_stopped.release()
        self._may_run.acquire()
        answer, self._answer = self._answer, None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _run(self) -> None:
        try:
            assert self._function is not None
            self.result = self._context.run(self._function)
        except BaseException as error:
            self.error = error
        finally:
            self._function = None  # with the data that it holds
            self.is_ended = True
            self._has_stopped.release()
