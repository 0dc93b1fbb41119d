"""What every record shares: where its artifacts lie, what it depends on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeAlias

from qtorch.core.configured import Configured
from qtorch.core.errors import LoadObjectError, RecordError
from qtorch.core.trust import trusted_type
from qtorch.tracking.current import current_recorder
from qtorch.tracking.recorder import Recorder

Names: TypeAlias = list[str]  # inside the class, `list` is the method of Qlib's name


@trusted_type
class Record(Configured, ABC):
    """Makes something of a run's results and stores it in the same run.

    Answers to Qlib's `RecordTemp` (workflow/record_temp.py). A subclass names the folder of its
    artifacts (`artifact_path`), the record it builds on (`depend_cls`), the artifacts it writes
    (`list`), and whether it compares the scores of a day with each other (`needs_cross_section`:
    one instrument a day is then an error before the training). Difference: a missing dependency
    is a RecordError that names it, where Qlib logs a warning and goes on.
    """

    artifact_path: ClassVar[str | None] = None
    depend_cls: ClassVar[type[Record] | None] = None
    needs_cross_section: ClassVar[bool] = False

    def __init__(self, recorder: Recorder | None = None) -> None:
        self._recorder = recorder

    @property
    def recorder(self) -> Recorder:
        """The run it works in: the given one, else the current one."""
        recorder = self._recorder or current_recorder()
        if recorder is None:
            raise RecordError(
                f"{type(self).__name__} works inside a run: give it a recorder, or call it inside "
                "`with R.start(...)`."
            )
        return recorder

    @classmethod
    def get_path(cls, name: str | None = None) -> str:
        """The logical name of an artifact of this record within the run."""
        return "/".join(part for part in (cls.artifact_path, name) if part)

    @abstractmethod
    def generate(self) -> Any:
        """Make and store the record."""

    def list(self) -> Names:
        """The artifacts it writes, without its folder."""
        return []

    def save(self, **objects: Any) -> None:
        """Store objects under this record's folder; the keywords are the names."""
        self.recorder.save_objects(artifact_path=self.artifact_path, **objects)

    def load(self, name: str, parents: bool = True) -> Any:
        """An artifact of this record or, failing that, of the records it builds on.

        Raises RecordError that names what was looked for.
        """
        tried: Names = []
        record: type[Record] | None = type(self)
        while record is not None:
            tried.append(record.get_path(name))
            try:
                return self.recorder.load_object(tried[-1])
            except LoadObjectError as error:
                record = record.depend_cls if parents else None
                last = error
        raise RecordError(self._missing(tried[:1] if not parents else tried)) from last

    def check(self, include_self: bool = False, parents: bool = True) -> None:
        """Raise RecordError naming the artifacts that are missing.

        `include_self` asks for what this record writes, `parents` for what it builds on.
        """
        missing = [self.get_path(n) for n in self.list()] if include_self else []
        if parents and self.depend_cls is not None:
            missing += [self.depend_cls.get_path(n) for n in self._needs()]
        missing = [path for path in missing if not self._holds(path)]
        if missing:
            raise RecordError(self._missing(missing))

    def _needs(self) -> Names:
        """Artifacts of `depend_cls` that this record reads."""
        return []

    def _holds(self, path: str) -> bool:
        folder, _, _ = path.rpartition("/")
        return path in self.recorder.list_artifacts(folder or None)

    def _missing(self, paths: Names) -> str:
        maker = f" Put {self.depend_cls.__name__} before it." if self.depend_cls else ""
        return (
            f"{type(self).__name__} needs {', '.join(paths)}, which run {self.recorder.id} does "
            f"not hold.{maker}"
        )
