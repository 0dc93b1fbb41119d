"""Storing objects: Qlib's Serializable (pickle), and a state of JSON and tensors without pickle."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

from qtorch.core.errors import ArgumentError, check_name
from qtorch.core.trust import load_pickle

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class State:
    """The data from which an object is rebuilt: plain JSON data and named tensors."""

    config: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class Stateful(Protocol):
    """Protocol of objects that are stored as JSON and safetensors instead of a pickle."""

    def to_state(self) -> State:
        """Return configuration and tensors; the caller stores the name of the class."""
        ...

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Rebuild the object."""
        ...


_OPTIONS = ("dump_all", "exclude", "include")
_ALWAYS = ("_arguments",)  # the constructor arguments of Configured describe the object


class Serializable:
    """Pickle objects by Qlib's rule: attributes whose name starts with `_` are left out.

    `include` overrides `exclude`, both override the underscore rule, and `dump_all` includes
    everything that is not excluded. Corresponds to qlib/utils/serial.py. Difference: `load` loads
    only a pickle that the user trusts.
    """

    def config(
        self,
        dump_all: bool | None = None,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
        recursive: bool = False,
    ) -> None:
        """Choose which attributes are pickled; `recursive` includes Serializable attributes."""
        options = {"dump_all": dump_all, "exclude": exclude, "include": include}
        self._configure({k: v for k, v in options.items() if v is not None}, recursive, set())

    def _configure(self, options: dict[str, Any], recursive: bool, visited_ids: set[int]) -> None:
        visited_ids.add(id(self))
        stored_options = self.__dict__.setdefault("_serial", {})
        stored_options.update({k: v if k == "dump_all" else list(v) for k, v in options.items()})
        if not recursive:
            return
        for value in list(self.__dict__.values()):
            if isinstance(value, Serializable) and id(value) not in visited_ids:
                value._configure(options, recursive, visited_ids)

    def _is_pickled(self, name: str) -> bool:
        options = self.__dict__.get("_serial", {})
        if name == "_serial":
            return False
        if name in _ALWAYS or name in options.get("include", ()):
            return True
        if name in options.get("exclude", ()):
            return False
        return bool(options.get("dump_all", False)) or not name.startswith("_")

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if self._is_pickled(k)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def to_pickle(self, path: str | Path, **options: Any) -> None:
        """Pickle to `path`; the options are those of `config`."""
        for name in options:
            check_name("option of to_pickle", name, _OPTIONS, error=ArgumentError)
        self.config(**options)
        with Path(path).open("wb") as file:
            pickle.dump(self, file)

    @classmethod
    def load(cls, path: str | Path, *, trusted_pickle: bool = False) -> Self:
        """Load a pickled object of this class; raise TypeError for an object of another class.

        Loading a pickle runs the code that its author put into it. TrustError is raised unless
        `trusted_pickle` is True, here or for the whole process (`qtorch.init`).
        """
        instance = load_pickle(path, is_trusted=trusted_pickle)
        if not isinstance(instance, cls):
            raise TypeError(
                f"{path} contains a {type(instance).__qualname__}, not a {cls.__qualname__}; load "
                f"it with {type(instance).__qualname__}.load."
            )
        return instance
