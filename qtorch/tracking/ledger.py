"""What a run holds already: so that each (metric, step) and each param is sent once."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping

log = logging.getLogger(__name__)


class Ledger:
    """Metrics and params of one run, those of earlier attempts and of this process.

    A metric given a step stands there with its first value: the same value again is dropped, and
    another one is too, with a warning, since a store keeps both and shows either. Without a step,
    the n-th value that this process gives a key belongs to step n - 1, so that a repeated program
    repeats its steps; where another value stands there already, it goes behind the last one.
    """

    def __init__(
        self,
        metrics: Mapping[str, Mapping[int, float]] | None = None,
        params: Mapping[str, str] | None = None,
    ) -> None:
        self.metrics = {key: dict(steps) for key, steps in (metrics or {}).items()}
        self.params = dict(params or {})
        self._calls: dict[str, int] = {}
        self._warned: set[str] = set()
        self._lock = threading.Lock()

    def admit_metric(self, key: str, value: float, step: int | None) -> int | None:
        """The step to send the value with; None where it stands already."""
        with self._lock:
            steps = self.metrics.setdefault(key, {})
            if step is None:
                step = self._calls.get(key, 0)
                self._calls[key] = step + 1
                if step in steps and not same(steps[step], value):
                    step = max(steps) + 1
                    self._calls[key] = step + 1
            if step not in steps:
                steps[step] = value
                return step
            if not same(steps[step], value) and key not in self._warned:
                self._warned.add(key)
                log.warning(
                    "metric %r at step %d stands as %r; the new value %r is not sent (nor are "
                    "later ones of this metric that differ)",
                    key,
                    step,
                    steps[step],
                    value,
                )
            return None

    def admit_param(self, key: str, value: str) -> str | None:
        """None where the param is new, else the value that stands."""
        with self._lock:
            if key in self.params:
                return self.params[key]
            self.params[key] = value
            return None


def same(a: float, b: float) -> bool:
    """Equal up to what a database may round; NaN equals NaN."""
    return a == b or (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=1e-12)
