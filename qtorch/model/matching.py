"""Whether data are what a fitted model learnt from: features by name, steps by number."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from qtorch.core.errors import DataError
from qtorch.core.trust import trusted_type
from qtorch.data.sample_set import Samples

log = logging.getLogger(__name__)


@trusted_type
@dataclass(frozen=True)
class LearntFrom:
    """The form of the samples that a model has learnt from."""

    feature_names: tuple[str, ...]
    num_features: int
    num_steps: int

    @classmethod
    def of(cls, samples: Samples) -> Self:
        """The form of these samples."""
        return cls(samples.feature_names, samples.num_features, samples.num_steps)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        """From what `plain` gave."""
        return cls(tuple(plain["feature_names"]), plain["num_features"], plain["num_steps"])

    def plain(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**asdict(self), "feature_names": list(self.feature_names)}

    def matched(self, samples: Samples, *, any_steps: bool = False) -> Samples:
        """Samples with the features learnt from, in the order learnt: matched by name.

        With `any_steps` the windows may be of another length.

        Raises DataError that lists the differences: features that are missing or new, another
        number of steps, another order where the data cannot be put in this one.
        """
        wrong = self._differences(samples, any_steps)
        if wrong:
            lines = "".join(f"\n  {line}" for line in wrong)
            raise DataError(f"the dataset does not fit the fitted model:{lines}")
        if samples.feature_names == self.feature_names:
            return samples
        log.info("the features stand in another order than the model learnt; matched by name")
        return samples.with_features(self.feature_names)

    def _differences(self, samples: Samples, any_steps: bool) -> list[str]:
        wrong = []
        if samples.num_features != self.num_features:
            wrong.append(
                f"{samples.num_features} features, the model learnt from {self.num_features}"
            )
        missing = [n for n in self.feature_names if n not in set(samples.feature_names)]
        added = [n for n in samples.feature_names if n not in set(self.feature_names)]
        if missing:
            wrong.append(f"features that are missing: {_listed(missing)}")
        if added:
            wrong.append(f"features that the model does not know: {_listed(added)}")
        if samples.num_steps != self.num_steps and not any_steps:
            wrong.append(
                f"windows of {samples.num_steps} steps, the model learnt from {self.num_steps} "
                "(dataset.step_len)"
            )
        if not wrong and samples.feature_names != self.feature_names and not samples.arrangeable:
            moved = [
                f"{there} for {here}"
                for here, there in zip(self.feature_names, samples.feature_names, strict=True)
                if here != there
            ]
            wrong.append(f"the features in another order: {_listed(moved)}")
        return wrong


def check_labels(train: Samples, valid: Samples | None) -> None:
    """Raise DataError where there is nothing to learn from."""
    for name, samples in (("train", train), ("valid", valid)):
        if samples is None:
            continue
        if not len(samples):
            raise DataError(f"the segment {name!r} holds no sample.")
        if samples.target is None:
            raise DataError(f"the samples of {name!r} have no label to learn from.")
        if bool(samples.target.isnan().all()):
            raise DataError(f"the label is NaN in all {len(samples)} samples of {name!r}.")
    if train.most_a_day == 1:
        log.warning(
            "every day of 'train' has one instrument alone: a time series is learnt, nothing is "
            "compared across instruments, and an IC is undefined"
        )


def check_cross_section(
    train: Samples, valid: Samples | None, *, monitor: str, day_label: Any
) -> None:
    """Raise DataError where instruments are to be compared and each day has one alone.

    `monitor` is the full name of the metric that is watched.
    """
    asked = {"train": day_label and "day_label", "valid": None}
    if monitor.rpartition("/")[2] in ("ic", "rank_ic"):
        asked["valid"] = f"monitor {monitor!r}"
    for name, samples in (("train", train), ("valid", valid)):
        if asked[name] and samples is not None and samples.most_a_day == 1:
            raise DataError(
                f"{asked[name]} compares the instruments of a day, and every day of the segment "
                f"{name!r} has one instrument alone: learn from a universe of several, or do "
                "without (monitor=loss, day_label=null)."
            )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8])
    return shown + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
