"""Objects that can be stored: Qlib's Serializable, and a state without pickle."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

from qtorch.core.errors import ArgumentError, unknown_name
from qtorch.core.trust import load_pickle, trusted_type

if TYPE_CHECKING:
    from torch import Tensor


@trusted_type
@dataclass
class State:
    """What rebuilds an object: plain JSON data and named tensors."""

    config: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class Stateful(Protocol):
    """An object that is stored as JSON and safetensors instead of a pickle."""

    def to_state(self) -> State:
        """Configuration and tensors; the storer adds the class's name."""
        ...

    @classmethod
    def from_state(cls, state: State) -> Self:
        """The object again."""
        ...


_OPTIONS = ("dump_all", "exclude", "include")
_ALWAYS = ("_arguments",)  # what Configured keeps describes the object; it is no cache


class Serializable:
    """Pickling by Qlib's rule: attributes whose name starts with `_` stay out.

    `include` wins over `exclude`, both over the underscore rule; `dump_all` keeps everything.
    Answers to qlib/utils/serial.py. Difference: reading goes through the trust rule.
    """

    def config(
        self,
        dump_all: bool | None = None,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
        recursive: bool = False,
    ) -> None:
        """Say what later dumps keep; `recursive` says it to Serializable attributes too."""
        given = {"dump_all": dump_all, "exclude": exclude, "include": include}
        self._configure({k: v for k, v in given.items() if v is not None}, recursive, set())

    def _configure(self, options: dict[str, Any], recursive: bool, seen: set[int]) -> None:
        seen.add(id(self))
        kept = self.__dict__.setdefault("_serial", {})
        kept.update({k: v if k == "dump_all" else list(v) for k, v in options.items()})
        if not recursive:
            return
        for value in list(self.__dict__.values()):
            if isinstance(value, Serializable) and id(value) not in seen:
                value._configure(options, recursive, seen)

    def _is_kept(self, name: str) -> bool:
        options = self.__dict__.get("_serial", {})
        if name == "_serial":
            return False
        if name in _ALWAYS or name in options.get("include", ()):
            return True
        if name in options.get("exclude", ()):
            return False
        return bool(options.get("dump_all", False)) or not name.startswith("_")

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if self._is_kept(k)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def to_pickle(self, path: str | Path, **options: Any) -> None:
        """Pickle to `path`; options as of `config`."""
        for name in options:
            if name not in _OPTIONS:
                raise ArgumentError(unknown_name("option of to_pickle", name, _OPTIONS))
        self.config(**options)
        with Path(path).open("wb") as file:
            pickle.dump(self, file)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a pickle of this class; a TypeError for an object of another one.

        The classes that it names pass the trust rule (`qtorch.core.trust`).
        """
        loaded = load_pickle(path)
        if not isinstance(loaded, cls):
            raise TypeError(
                f"{path} holds a {type(loaded).__qualname__}, not a {cls.__qualname__}; load it "
                f"with {type(loaded).__qualname__}.load."
            )
        return loaded
