"""What a sweep has to know about its launcher, and the launcher's class by its name."""

from __future__ import annotations

from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher

from qtorch.core.names import import_path


class OwnProcessLauncher:
    """Mixin of launchers that run each job in a process of its own."""


class SharedProcessLauncher:
    """Mixin of launchers whose jobs all run in the launcher's process."""


class DetachedLauncher(OwnProcessLauncher):
    """Mixin of launchers whose jobs continue after the process that launched them has ended."""


def launcher_class(name: str) -> type[Any]:
    """Return the class of `hydra.launcher._target_`; Launcher itself if it is not installed."""
    launcher: type[Any] = Plugins.instance().class_name_to_class.get(name, Launcher)
    return launcher


def is_basic_launcher(launcher: type[Any]) -> bool:
    """Whether a class is Hydra's own launcher, which runs one job after another in this thread.

    Hydra loads its plugins a second time, so that its class is not the one that we import.
    """
    return import_path(launcher) == import_path(BasicLauncher)
