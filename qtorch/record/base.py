"""The base class of all records: artifact paths, dependencies and their checks."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any, ClassVar, TypeAlias

from qtorch.core.configured import Configured
from qtorch.core.errors import LoadObjectError, RecordError
from qtorch.core.trust import trust_subclasses
from qtorch.tracking.recorder import Recorder, current_recorder

log = logging.getLogger(__name__)

Names: TypeAlias = list[str]  # inside the class, `list` is the method named by Qlib


@trust_subclasses
class Record(Configured, ABC):
    """Computes something from a run's results and stores it in the same run.

    Corresponds to Qlib's `RecordTemp` (workflow/record_temp.py). A subclass defines the folder of
    its artifacts (`artifact_path`), the record it depends on (`depend_cls`) and what it reads of
    that (`input_artifacts`), the artifacts it writes (`list`), and whether it compares the scores
    within a day (`needs_cross_section`: a dataset with one instrument per day is then rejected
    before the training). Difference from Qlib: a missing dependency raises RecordError; Qlib logs
    a warning and continues.
    """

    artifact_path: ClassVar[str | None] = None
    depend_cls: ClassVar[type[Record] | None] = None
    input_artifacts: ClassVar[tuple[str, ...]] = ()
    needs_cross_section: ClassVar[bool] = False

    def __init__(self, recorder: Recorder | None = None) -> None:
        self._recorder = recorder

    @property
    def recorder(self) -> Recorder:
        """The recorder of the run: the one passed in, else the current one."""
        recorder = self._recorder or current_recorder()
        if recorder is None:
            raise RecordError(
                f"{type(self).__name__} works inside a run: pass a recorder, or call it inside "
                "`with R.start(...)`."
            )
        return recorder

    @classmethod
    def get_path(cls, path: str | None = None) -> str:
        """Return the logical name of an artifact of this record within the run."""
        return "/".join(part for part in (cls.artifact_path, path) if part)

    def check_settings(self) -> None:
        """Raise an error for settings that the record cannot be generated with.

        It is called before the training, without a run and without data.
        """

    def check_segment_names(self, names: Collection[str]) -> None:
        """Raise ConfigError if the record needs a segment that is not among a dataset's names.

        It is called before the training, and before the data is read.
        """

    @abstractmethod
    def generate(self) -> Any:
        """Compute and store the record."""

    def list(self) -> Names:
        """Return the names of the artifacts that this record writes, without its folder."""
        return []

    def save(self, **objects: Any) -> None:
        """Save objects in this record's folder; the keywords are their names."""
        self.recorder.save_objects(artifact_path=self.artifact_path, **objects)

    def load(self, name: str, parents: bool = True) -> Any:
        """Load an artifact of this record or, if it has none, of the records it depends on.

        Raises RecordError with the names that were tried.
        """
        paths: Names = []
        record_class: type[Record] | None = type(self)
        while record_class is not None:
            paths.append(record_class.get_path(name))
            try:
                return self.recorder.load_object(paths[-1])
            except LoadObjectError as error:
                record_class = record_class.depend_cls if parents else None
                last_error = error
        raise RecordError(self._missing_text(paths[:1] if not parents else paths)) from last_error

    def check(self, include_self: bool = False, parents: bool = True) -> None:
        """Raise RecordError with the names of the missing artifacts.

        `include_self` checks what this record writes, `parents` what it depends on.
        """
        paths = [self.get_path(n) for n in self.list()] if include_self else []
        if parents and self.depend_cls is not None:
            paths += [self.depend_cls.get_path(n) for n in self.input_artifacts]
        missing = [path for path in paths if not has_artifact(self.recorder, path)]
        if missing:
            raise RecordError(self._missing_text(missing))

    def _is_complete(self) -> bool:
        """Whether all artifacts that this record writes exist; if so, log that it is skipped."""
        is_complete = all(has_artifact(self.recorder, self.get_path(n)) for n in self.list())
        if is_complete:
            log.info("skipped %s: its artifacts exist", type(self).__name__)
        return is_complete

    def _missing_text(self, paths: Names) -> str:
        hint = f" Run {self.depend_cls.__name__} before it." if self.depend_cls else ""
        return (
            f"{type(self).__name__} needs {', '.join(paths)}, but run {self.recorder.id} does "
            f"not have it.{hint}"
        )


def has_artifact(recorder: Recorder, path: str) -> bool:
    """Whether a run has the artifact with this logical name."""
    folder, _, _ = path.rpartition("/")
    return path in recorder.list_artifacts(folder or None)
