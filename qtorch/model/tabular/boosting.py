"""Base class of the models of gradient-boosted trees: training, finetuning, reports and saving."""

from __future__ import annotations

import logging
import re
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qtorch.core.errors import ConfigError, check_count, install_command
from qtorch.core.identity import digest
from qtorch.model.base import ModelFT
from qtorch.model.input_schema import has_valid_segment
from qtorch.model.loop.curves import name_curves
from qtorch.model.tabular.base import Rows, TabularModel
from qtorch.process.heartbeat import beat
from qtorch.tracking.recorder import current_recorder

if TYPE_CHECKING:
    from qtorch.tracking.recorder import Recorder, TrainingRecorder

log = logging.getLogger(__name__)

FINETUNE_ROUNDS = 10

Evaluations = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Boosting:
    """The trees of one training, saved by their library as `content`, and how it went.

    `evaluations` are the metrics of each round: `{"train": {"l2": [...]}, "valid": {...}}`.
    `best_round` counts from 0; it is None without early stopping.
    """

    content: bytes
    evaluations: Evaluations
    best_round: int | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Rounds:
    """How many rounds a training has at most, and what happens after each of them.

    It stops when a metric of the valid segment has not improved for `patience` rounds (0: never).
    Each `log_every`-th round is a line of the log (0: none).
    """

    limit: int
    patience: int = 0
    log_every: int = 0

    def report(self, number: int, evaluations: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
        """Report a finished round, counted from 0, to the heartbeat and the log."""
        beat("training", epoch=number)
        if self.log_every > 0 and (number + 1) % self.log_every == 0:
            values = ", ".join(
                f"{segment}/{name} {float(curve[-1]):.6g}"
                for segment, metrics in evaluations.items()
                for name, curve in metrics.items()
            )
            log.info("round %d: %s", number, values)


class BoostedTrees(TabularModel, ModelFT):
    """A model of boosted trees: one library's trees, trained by rounds with early stopping.

    Boosting stops when a metric of the valid segment has not improved for `early_stopping_rounds`
    (0: never), at the latest after `num_boost_round` rounds; the trees up to that metric's best
    round are kept. Subclasses call their library in `_boost`, `_load_booster` and `_score`.

    After `fit`: `booster`, `evals_result_` ({"train": {"l2": [...]}, "valid": {...}}),
    `fit_report_`.
    """

    def __init__(self, early_stopping_rounds: int, num_boost_round: int) -> None:
        name = type(self).__name__
        check_count(f"early_stopping_rounds of {name}", early_stopping_rounds, minimum=0)
        check_count(f"num_boost_round of {name}", num_boost_round)
        self.early_stopping_rounds = early_stopping_rounds
        self.num_boost_round = num_boost_round
        self.content_: bytes | None = None  # the booster, as its library saves it
        self.evals_result_: Evaluations = {}
        self.fit_report_: dict[str, Any] = {}
        self._booster: Any = None  # is not stored, but rebuilt from content_

    @property
    def booster(self) -> Any:
        """The fitted booster of the library."""
        self._require_feature_names()
        if getattr(self, "_booster", None) is None:  # a loaded model lacks the attribute
            assert self.content_ is not None, "a fitted model has its trees"
            self._booster = self._load_booster(self.content_)
        return self._booster

    # -- training ------------------------------------------------------------------------------

    def fit(
        self,
        dataset: Any,
        reweighter: Any = None,
        *,
        recorder: Recorder | None = None,
        evals_result: dict[str, Any] | None = None,
        num_boost_round: int | None = None,
        early_stopping_rounds: int | None = None,
        verbose_eval: int | bool = False,
    ) -> None:
        """Train on the segment "train", with early stopping on "valid" if the dataset has it.

        The metrics of each round are logged to the recorder as `train/l2`, `valid/l2` (by the
        library's names of metrics), and written into `evals_result` in the form of Qlib's class:
        LightGBM's are `{"train": {"l2": [...]}, "valid": {...}}`, those of XGBoost and CatBoost the
        lists "train" and "valid" of the first metric. `num_boost_round` and
        `early_stopping_rounds` count more than the model's own. Each `verbose_eval`-th round (True:
        each one) is a line of the log. Raises DataError if there is nothing to learn from.
        """
        rounds = Rounds(
            self.num_boost_round if num_boost_round is None else num_boost_round,
            self.early_stopping_rounds if early_stopping_rounds is None else early_stopping_rounds,
            int(verbose_eval),
        )
        train = self._rows(dataset, "train", reweighter)
        valid = None
        if has_valid_segment(dataset):
            valid = self._rows(dataset, "valid", reweighter, train.names)
        self._train(train, valid, rounds, recorder)
        if evals_result is not None:
            evals_result.update(self._list_evaluations())

    def _list_evaluations(self) -> dict[str, Any]:
        """Return the metrics of the rounds as `fit` of Qlib's class gives them to its caller."""
        return dict(self.evals_result_)

    def finetune(
        self,
        dataset: Any,
        reweighter: Any = None,
        *,
        recorder: Recorder | None = None,
        num_boost_round: int = FINETUNE_ROUNDS,
        verbose_eval: int | bool = False,
    ) -> None:
        """Train more rounds on the segment "train", on top of the fitted trees.

        Each `verbose_eval`-th round (True: each one) is a line of the log.
        Raises NotFittedError before `fit`, and DataError if a feature of the training is missing.
        """
        names = self._require_feature_names()
        train = self._rows(dataset, "train", reweighter, names)
        rounds = Rounds(num_boost_round, log_every=int(verbose_eval))
        self._train(train, None, rounds, recorder, self.booster)

    def _train(
        self,
        train: Rows,
        valid: Rows | None,
        rounds: Rounds,
        recorder: Recorder | None,
        init_booster: Any = None,
    ) -> None:
        start_time = time.perf_counter()
        boosting = self._boost(train, valid, rounds, init_booster)
        seconds = time.perf_counter() - start_time
        self.content_, self._booster = boosting.content, None
        self.feature_names_ = train.names
        self.evals_result_ = boosting.evaluations
        self.fit_report_ = make_fit_report(train, valid, boosting, seconds)
        log.info("trained %d rounds in %.1f s", self.fit_report_["epochs"], seconds)
        run = current_recorder() if recorder is None else recorder
        if run is not None:
            log_curves([self.evals_result_], run, "fit" if init_booster is None else "finetune")

    @abstractmethod
    def _boost(
        self, train: Rows, valid: Rows | None, rounds: Rounds, init_booster: Any = None
    ) -> Boosting:
        """Train by rounds, on top of the trees of `init_booster` if there is one."""

    @abstractmethod
    def _load_booster(self, content: bytes) -> Any:
        """Return the booster that `_boost` has saved."""

    # -- fitted model --------------------------------------------------------------------------

    def _sort_importance(self, values: Sequence[float] | np.ndarray) -> pd.Series:
        """Return the importance of the features, `values [F]`, the largest first."""
        importance = pd.Series(values, index=list(self._require_feature_names()))
        return importance.sort_values(ascending=False)

    def _get_fitted_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        fitted_state = {"evals_result": self.evals_result_, "fit_report": self.fit_report_}
        return fitted_state, {"booster": bytes_tensor(self.content_ or b"")}

    def _load_fitted_state(self, fitted_state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.content_ = tensors["booster"].numpy().tobytes()
        self.evals_result_ = fitted_state["evals_result"]
        self.fit_report_ = fitted_state["fit_report"]


def make_fit_report(
    train: Rows, valid: Rows | None, boosting: Boosting, seconds: float
) -> dict[str, Any]:
    """Return a report with the keys of the networks', in which a round is an epoch."""
    segment = "train" if valid is None else "valid"
    metric, values = next(iter(boosting.evaluations[segment].items()))
    best_round = boosting.best_round
    return {
        "epochs": len(values),
        "best_epoch": best_round,
        "monitor": f"{segment}/{metric}",
        "best_value": values[-1 if best_round is None else best_round],
        "seconds": seconds,
        "samples": len(train),
        "valid_samples": 0 if valid is None else len(valid),
        "samples_per_second": len(train) * len(values) / seconds,
        "device": boosting.device,
    }


def list_first_metric(evaluations: Evaluations) -> dict[str, list[float]]:
    """Return each segment's values of its first metric: `{"train": [...], "valid": [...]}`."""
    return {name: list(next(iter(metrics.values()))) for name, metrics in evaluations.items()}


def log_curves(parts: Sequence[Evaluations], recorder: Recorder, kind: str) -> None:
    """Log the metrics of a training; a later training of the run has names of its own.

    `kind` is "fit" or "finetune", see `qtorch.model.loop.curves`. Equal curves are those of the
    same training, which has been repeated.
    """
    named = name_curves(recorder, None, kind, digest(list(parts)))
    assert named is not None, "there is a recorder"
    for part in parts:
        log_evaluations(part, named)


def log_evaluations(evaluations: Evaluations, recorder: TrainingRecorder) -> None:
    """Log the metrics of each round as `train/l2`, `valid/l2`; the step is the round."""
    values_by_metric = {
        f"{segment}/{name}": values
        for segment, metrics in evaluations.items()
        for name, values in metrics.items()
    }
    for step, values in enumerate(zip(*values_by_metric.values(), strict=True)):
        recorder.log_batch(dict(zip(values_by_metric, values, strict=True)), step=step)


def bytes_tensor(content: bytes) -> Tensor:
    """Return bytes as a tensor `[K]` of uint8, to be saved beside other tensors."""
    return torch.tensor(np.frombuffer(content, dtype=np.uint8))


def library_names(names: tuple[str, ...]) -> list[str]:
    """Return feature names that the libraries accept: without the special characters of JSON."""
    # Two names can become equal without those characters; then all features are numbered.
    clean_names = [re.sub(r"[\s\",:\[\]{}<>]", "_", name) for name in names]
    if len(set(clean_names)) < len(names):
        return [f"feature{k}" for k in range(len(names))]
    return clean_names


def check_values(
    model: str, parameters: Mapping[str, Any], find_fault: Callable[[Mapping[str, Any]], str | None]
) -> None:
    """Raise ConfigError, which names the parameter, if a library refuses values of parameters.

    `find_fault` returns what the library says against parameters; None if it takes them.
    """
    fault = find_fault(parameters)
    if fault is None:
        return
    for name, value in parameters.items():  # some are only right together
        single_fault = find_fault({name: value})
        if single_fault is not None:
            raise ConfigError(f"{name} of {model} is {value!r}: {single_fault}")
    raise ConfigError(f"{model} with {dict(parameters)}: {fault}")


@contextmanager
def require_library(model: str, library: str, extra: str) -> Iterator[None]:
    """Turn the failing import of a library into an error that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != extra:  # a dependency of the library is missing
            raise
        raise ConfigError(f"{model} needs {library}: {install_command(extra)}.") from error
