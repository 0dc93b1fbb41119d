"""Samples for training, and what a model expects of them: features by name, steps, labels."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any, Self

from qtorch.core.errors import DataError, join_names
from qtorch.data.dataset.qlib_dataset import get_samples
from qtorch.data.dataset.samples import Samples

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InputSchema:
    """The features and window length of the samples that a model was trained on."""

    feature_names: tuple[str, ...]
    num_features: int
    num_steps: int

    @classmethod
    def from_samples(cls, samples: Samples) -> Self:
        """Return the schema of these samples."""
        return cls(samples.feature_names, samples.num_features, samples.num_steps)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build a schema from the result of `to_dict`."""
        return cls(tuple(values["feature_names"]), values["num_features"], values["num_steps"])

    def to_dict(self) -> dict[str, Any]:
        """Return the schema as JSON values."""
        return {**asdict(self), "feature_names": list(self.feature_names)}

    def match_features(self, samples: Samples, *, any_steps: bool = False) -> Samples:
        """Return the samples with the training features, in training order, matched by name.

        With `any_steps` the windows may have another length. Raises DataError, which lists the
        differences: missing or additional features, another number of steps, or another order that
        the data cannot be rearranged from.
        """
        differences = self._differences(samples, any_steps)
        if differences:
            lines = "".join(f"\n  {line}" for line in differences)
            raise DataError(f"the dataset does not match the fitted model:{lines}")
        if samples.feature_names == self.feature_names:
            return samples
        log.info("the features are in another order than in training; matched by name")
        return samples.with_features(self.feature_names)

    def _differences(self, samples: Samples, any_steps: bool) -> list[str]:
        differences = []
        if samples.num_features != self.num_features:
            differences.append(
                f"{samples.num_features} features, but the model was trained on {self.num_features}"
            )
        missing = [n for n in self.feature_names if n not in set(samples.feature_names)]
        extra = [n for n in samples.feature_names if n not in set(self.feature_names)]
        if missing:
            differences.append(f"missing features: {join_names(missing)}")
        if extra:
            differences.append(f"additional features: {join_names(extra)}")
        if samples.num_steps != self.num_steps and not any_steps:
            differences.append(
                f"windows of {samples.num_steps} steps, but the model was trained on "
                f"{self.num_steps} (dataset.step_len)"
            )
        if not differences and not samples.can_reorder_features:
            pairs = zip(self.feature_names, samples.feature_names, strict=True)
            changes = [f"{actual} instead of {name}" for name, actual in pairs if actual != name]
            if changes:
                differences.append(f"another order of features: {join_names(changes)}")
        return differences


def has_valid_segment(dataset: Any) -> bool:
    """Whether a dataset has a segment "valid"; one that names no segments is expected to."""
    return "valid" in getattr(dataset, "segments", ("valid",))


def load_training_samples(dataset: Any, segment: str, reweighter: Any) -> Samples:
    """Return a segment's samples for training, with the weights of the reweighter, if any."""
    if callable(getattr(reweighter, "bind", None)):
        reweighter.bind(dataset)
    return get_samples(dataset, segment, data_key="learn").apply_reweighter(reweighter)


def check_labels(train: Samples, valid: Samples | None) -> None:
    """Raise DataError if there is nothing to learn from."""
    for name, samples in (("train", train), ("valid", valid)):
        if samples is None:
            continue
        if not len(samples):
            raise DataError(f"the segment {name!r} has no samples.")
        if samples.target is None:
            raise DataError(f"the samples of {name!r} have no labels.")
        if bool(samples.target.isnan().all()):
            raise DataError(f"the label is NaN in all {len(samples)} samples of {name!r}.")
    if train.max_samples_per_day == 1:
        log.warning(
            "every day of 'train' has only one instrument: the model learns a time series, without "
            "comparing instruments, and ICs are undefined"
        )


def check_cross_section(
    train: Samples, valid: Samples | None, *, monitor: str, day_label: Any
) -> None:
    """Raise DataError if instruments should be compared but each day has only one.

    `monitor` is the full name of the monitored metric.
    """
    requirements = {"train": day_label and "day_label", "valid": None}
    if monitor.rpartition("/")[2] in ("ic", "rank_ic"):
        requirements["valid"] = f"monitor {monitor!r}"
    for name, samples in (("train", train), ("valid", valid)):
        if requirements[name] and samples is not None and samples.max_samples_per_day == 1:
            raise DataError(
                f"{requirements[name]} compares the instruments of a day, but every day of the "
                f"segment {name!r} has only one instrument: use a universe of several instruments, "
                "or set monitor=loss and day_label=null."
            )
