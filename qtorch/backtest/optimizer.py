"""Portfolio optimizer of enhanced indexing: score against tracking error, by convex programming."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from qtorch.backtest.quotes import Bools, Floats
from qtorch.core.configured import Configured
from qtorch.core.errors import ConfigError
from qtorch.core.trust import trust_subclasses

log = logging.getLogger(__name__)


@trust_subclasses
class EnhancedIndexingOptimizer(Configured):
    """Find long-only weights w that sum to 1 and maximise (w - b)'r - lamb * risk(w - b).

    b are the benchmark's weights, r the scores. With d = w - b the risk is d'F C F'd + d'diag(u)d
    of a factor model: exposures F `[N, K]`, factor covariance C `[K, K]`, residual variance u
    `[N]`. `delta` bounds the turnover (the sum of absolute weight changes), `b_dev` the distance
    of each weight from the benchmark, `f_dev` the exposure of d to each factor (one number, or one
    per factor). `scale_return` scales the scores to the volatility that the risk model expects.
    Weights below `epsilon` become 0. If the problem has no solution it is solved again without
    `delta`; if that fails too the current weights are kept. Both cases log a warning.

    Corresponds to Qlib's optimizer of that name (contrib/strategy/optimizer/enhanced_indexing.py).
    Difference: cvxpy chooses the solver, while Qlib always uses ECOS. Needs the extra `optimize`.
    """

    def __init__(
        self,
        lamb: float = 1.0,
        delta: float | None = 0.2,
        b_dev: float | None = 0.01,
        f_dev: float | list[float] | None = None,
        scale_return: bool = True,
        epsilon: float = 5e-5,
        solver_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value in (("lamb", lamb), ("delta", delta), ("b_dev", b_dev), ("f_dev", f_dev)):
            if value is not None and np.min(value) < 0:
                raise ConfigError(f"{name}={value!r}: expected zero or more.")
        self.lamb, self.delta, self.b_dev, self.f_dev = lamb, delta, b_dev, f_dev
        self.scale_return, self.epsilon = scale_return, epsilon
        self.solver_kwargs = dict(solver_kwargs or {})

    def __call__(
        self,
        score: Floats,
        exposure: Floats,
        factor_cov: Floats,
        residual_var: Floats,
        current: Floats,
        benchmark: Floats,
        hold: Bools | None = None,
        sell: Bools | None = None,
    ) -> Floats:
        """Return the weights `[N]`, with sum 1.

        Instruments of `hold` keep their current weight, those of `sell` get weight 0.
        """
        cp = _import_cvxpy()
        if self.scale_return:
            total = np.einsum("nk,kl,nl->n", exposure, factor_cov, exposure) + residual_var
            spread = score.std()
            score = score / spread * np.sqrt(total.mean()) if spread > 0 else score * 0.0
        weight = cp.Variable(len(score), nonneg=True)
        active = weight - benchmark
        # Use the matrix root of the covariance: a sum of squares stays convex despite rounding.
        values, vectors = np.linalg.eigh((factor_cov + factor_cov.T) / 2)
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        risk = cp.sum_squares((exposure @ root).T @ active) + residual_var @ cp.square(active)
        objective = cp.Maximize(active @ score - self.lamb * risk)
        low, high = self._bounds(current, benchmark, hold, sell)
        constraints = [cp.sum(weight) == 1, weight >= low, weight <= high]
        if self.f_dev is not None:
            constraints += [cp.abs(exposure.T @ active) <= np.asarray(self.f_dev)]
        turnover = []
        if self.delta is not None and current.sum() > 0:
            turnover = [cp.norm(weight - current, 1) <= self.delta]
        for turnover_limit in (turnover, []) if turnover else ([],):
            solution = self._solve(cp, cp.Problem(objective, constraints + turnover_limit), weight)
            if solution is not None:
                return solution
        log.warning("enhanced indexing: no feasible portfolio; keeping the current weights")
        return current

    def _bounds(
        self, current: Floats, benchmark: Floats, hold: Bools | None, sell: Bools | None
    ) -> tuple[Floats, Floats]:
        low, high = np.zeros_like(benchmark), np.ones_like(benchmark)
        if self.b_dev is not None:
            low = np.maximum(low, benchmark - self.b_dev)
            high = np.minimum(high, benchmark + self.b_dev)
        if hold is not None:
            low, high = np.where(hold, current, low), np.where(hold, current, high)
        if sell is not None:  # takes precedence over hold
            low, high = np.where(sell, 0.0, low), np.where(sell, 0.0, high)
        return low, high

    def _solve(self, cp: Any, problem: Any, weight: Any) -> Floats | None:
        try:
            problem.solve(**self.solver_kwargs)
        except cp.error.SolverError as error:
            log.warning("enhanced indexing: the solver failed: %s", error)
            return None
        if problem.status not in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE):
            log.warning("enhanced indexing: the problem is %s", problem.status)
            return None
        if problem.status == cp.OPTIMAL_INACCURATE:
            log.warning("enhanced indexing: the solution is inaccurate")
        weights = np.where(weight.value < self.epsilon, 0.0, weight.value)
        return np.asarray(weights / weights.sum())


def _import_cvxpy() -> Any:
    try:
        import cvxpy  # type: ignore[import-not-found,unused-ignore]  # an extra
    except ImportError as error:
        raise ConfigError(
            "EnhancedIndexingStrategy needs cvxpy: pip install 'qtorch[optimize]'."
        ) from error
    return cvxpy
