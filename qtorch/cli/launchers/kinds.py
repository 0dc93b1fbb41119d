"""What a sweep has to know about its launcher, and the launcher's class by its name."""

from __future__ import annotations

from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher


class OwnProcessLauncher:
    """Mixin of launchers that run each job in a process of its own."""


class DetachedLauncher(OwnProcessLauncher):
    """Mixin of launchers whose jobs continue after the process that launched them has ended."""


def launcher_class(name: str) -> type[Any]:
    """Return the class of `hydra.launcher._target_`; Launcher itself if it is not installed."""
    launcher: type[Any] = Plugins.instance().class_name_to_class.get(name, Launcher)
    return launcher
