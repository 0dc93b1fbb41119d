"""The metrics and params that a run already has, so that each is sent to the store once."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping

log = logging.getLogger(__name__)


class Ledger:
    """Metrics and params of one run: those of earlier attempts and of this process.

    The first value of a (metric, step) counts. The same value again is dropped; a different one is
    dropped with a warning, because a store would keep both and show either of them. Without a
    step, the n-th value that this process logs for a key gets step n - 1, so that a program that
    is run again repeats its steps. If that step already has another value, the new value goes
    after the last step.
    """

    def __init__(
        self,
        metrics: Mapping[str, Mapping[int, float]] | None = None,
        params: Mapping[str, str] | None = None,
    ) -> None:
        self.metrics = {key: dict(steps) for key, steps in (metrics or {}).items()}
        self.params = dict(params or {})
        self._next_steps: dict[str, int] = {}
        self._warned_keys: set[str] = set()
        self._lock = threading.Lock()

    def record_metric(self, key: str, value: float, step: int | None) -> int | None:
        """Record a metric value; return the step to send it with, None if the step has a value."""
        with self._lock:
            steps = self.metrics.setdefault(key, {})
            if step is None:
                step = self._next_steps.get(key, 0)
                self._next_steps[key] = step + 1
                if step in steps and not is_same_value(steps[step], value):
                    step = max(steps) + 1
                    self._next_steps[key] = step + 1
            if step not in steps:
                steps[step] = value
                return step
            if not is_same_value(steps[step], value) and key not in self._warned_keys:
                self._warned_keys.add(key)
                log.warning(
                    "metric %r at step %d already has the value %r; the new value %r is not sent "
                    "(further differences of this metric are not reported)",
                    key,
                    step,
                    steps[step],
                    value,
                )
            return None

    def record_param(self, key: str, value: str) -> str | None:
        """Record a param; return None if it is new, else the value that it already has."""
        with self._lock:
            if key in self.params:
                return self.params[key]
            self.params[key] = value
            return None


def is_same_value(a: float, b: float) -> bool:
    """Whether two values are equal up to a database's rounding; NaN equals NaN."""
    return a == b or (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=1e-12)
