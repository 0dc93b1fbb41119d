"""Group a flat mapping by its compound keys, and reduce each group to one object."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qtorch.core.errors import ConfigError
from qtorch.study.ensemble import RollingEnsemble


class Group:
    """Groups a mapping, then reduces each group. Corresponds to qlib/model/ens/group.py.

    `group_func` turns `{(A, B, C1): x, (A, B, C2): y}` into `{(A, B): {C1: x, C2: y}}`. `ens` (an
    Ensemble or any callable) reduces the mapping of a group to one object.
    """

    def __init__(
        self,
        group_func: Callable[..., Mapping[Any, Any]] | None = None,
        ens: Callable[..., Any] | None = None,
    ) -> None:
        self._group_func = group_func
        self._ens_func = ens

    def group(self, *args: Any, **kwargs: Any) -> Mapping[Any, Any]:
        """Return the mapping of groups."""
        if self._group_func is None:
            raise ConfigError(
                f"{type(self).__name__} has no group_func; pass one to the constructor."
            )
        return self._group_func(*args, **kwargs)

    def reduce(self, *args: Any, **kwargs: Any) -> Any:
        """Reduce one group to one object."""
        if self._ens_func is None:
            raise ConfigError(f"{type(self).__name__} has no ens to reduce its groups with.")
        return self._ens_func(*args, **kwargs)

    def __call__(
        self,
        ungrouped_dict: Mapping[Any, Any],
        n_jobs: int = 1,
        verbose: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> dict[Any, Any]:
        """Return `{group: object}`; further arguments are passed to `group`.

        `n_jobs` threads reduce the groups; less than 1 stands for ThreadPoolExecutor's default.
        `verbose` is ignored; it exists for compatibility with Qlib.
        """
        groups = self.group(ungrouped_dict, *args, **kwargs)
        if n_jobs == 1:
            return {key: self.reduce(value) for key, value in groups.items()}
        with ThreadPoolExecutor(None if n_jobs < 1 else n_jobs) as pool:
            return dict(zip(groups, pool.map(self.reduce, groups.values()), strict=True))


class RollingGroup(Group):
    """Groups by all parts of a tuple key except the last, which identifies the window."""

    def __init__(self, ens: Callable[..., Any] | None = None) -> None:
        super().__init__(ens=RollingEnsemble() if ens is None else ens)

    def group(self, rolling_dict: Mapping[Any, Any]) -> dict[Any, dict[Any, Any]]:
        """Turn `{(A, B, window): x}` into `{(A, B): {window: x}}`; TypeError for other keys."""
        groups: dict[Any, dict[Any, Any]] = {}
        for key, value in rolling_dict.items():
            if not isinstance(key, tuple):
                raise TypeError(
                    f"RollingGroup expects tuple keys whose last part is the window, got {key!r}; "
                    "pass the collector a rec_key_func that returns a tuple."
                )
            groups.setdefault(key[:-1], {})[key[-1]] = value
        return groups
