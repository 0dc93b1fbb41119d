"""Register qtorch's launchers and sweepers with Hydra.

Hydra accepts a plugin only under a name below `hydra_plugins`, the namespace package of installed
plugins. Our classes live in this package and are registered under such a name: nothing has to be
installed beside qtorch, and a process that unpickles one imports it from its own module.
"""

from __future__ import annotations

from hydra.core.plugins import Plugins
from hydra.plugins.plugin import Plugin

from qtorch.cli.launchers.fleet import FleetLauncher
from qtorch.cli.launchers.optuna_sweeper import OptunaSweeper
from qtorch.cli.launchers.ray import RayLauncher
from qtorch.cli.launchers.submitit import SUBMITIT_LAUNCHERS

PACKAGE = "hydra_plugins.qtorch"


def register_plugins() -> None:
    """Register our plugins before Hydra runs; calling it again changes nothing."""
    registry = Plugins.instance().class_name_to_class
    plugins: tuple[type[Plugin], ...] = (
        OptunaSweeper,
        FleetLauncher,
        RayLauncher,
        *SUBMITIT_LAUNCHERS,
    )
    for plugin in plugins:
        registry[f"{PACKAGE}.{plugin.__name__}"] = plugin
