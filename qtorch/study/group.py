"""A flat mapping by compound keys as groups, each reduced to one object."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qtorch.core.errors import ConfigError
from qtorch.study.ensemble import RollingEnsemble


class Group:
    """Groups a mapping, then reduces each group. Answers to qlib/model/ens/group.py.

    `group_func`: `{(A, B, C1): x, (A, B, C2): y}` to `{(A, B): {C1: x, C2: y}}`. `ens` reduces a
    group's mapping to one object: an Ensemble, or any callable.
    """

    def __init__(
        self,
        group_func: Callable[..., Mapping[Any, Any]] | None = None,
        ens: Callable[..., Any] | None = None,
    ) -> None:
        self._group_func = group_func
        self._ens_func = ens

    def group(self, *args: Any, **kwargs: Any) -> Mapping[Any, Any]:
        """The mapping of groups."""
        if self._group_func is None:
            raise ConfigError(f"{type(self).__name__} was given no group_func.")
        return self._group_func(*args, **kwargs)

    def reduce(self, *args: Any, **kwargs: Any) -> Any:
        """One group as one object."""
        if self._ens_func is None:
            raise ConfigError(f"{type(self).__name__} was given no ens to reduce its groups with.")
        return self._ens_func(*args, **kwargs)

    def __call__(
        self,
        ungrouped_dict: Mapping[Any, Any],
        n_jobs: int = 1,
        verbose: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> dict[Any, Any]:
        """`{group: object}`; `n_jobs` groups at a time, further arguments are `group`'s.

        `verbose` is taken for Qlib's sake.
        """
        groups = self.group(ungrouped_dict, *args, **kwargs)
        if n_jobs == 1:
            return {key: self.reduce(value) for key, value in groups.items()}
        with ThreadPoolExecutor(None if n_jobs < 1 else n_jobs) as pool:
            return dict(zip(groups, pool.map(self.reduce, groups.values()), strict=True))


class RollingGroup(Group):
    """Groups by all parts of a tuple key but the last, which names the window."""

    def __init__(self, ens: Callable[..., Any] | None = None) -> None:
        super().__init__(ens=RollingEnsemble() if ens is None else ens)

    def group(self, rolling_dict: Mapping[Any, Any]) -> dict[Any, dict[Any, Any]]:
        """`{(A, B, window): x}` as `{(A, B): {window: x}}`; TypeError for keys of other kinds."""
        groups: dict[Any, dict[Any, Any]] = {}
        for key, value in rolling_dict.items():
            if not isinstance(key, tuple):
                raise TypeError(
                    f"RollingGroup expects tuple keys whose last part is the window, got {key!r}; "
                    "give the collector a rec_key_func that returns a tuple."
                )
            groups.setdefault(key[:-1], {})[key[-1]] = value
        return groups
