"""Makes our launchers and sweepers known to Hydra.

Hydra takes a plugin only under a name below `hydra_plugins`, the package in which installed ones
lie. Ours are classes of this package under such a name: nothing is laid beside qtorch, and a
process that unpickles one finds it by its own module.
"""

from __future__ import annotations

from hydra.core.plugins import Plugins
from hydra.plugins.plugin import Plugin

from qtorch.cli.optuna_sweeper import OptunaSweeper
from qtorch.cli.ray_launcher import RayLauncher
from qtorch.cli.submitit_launcher import SUBMITIT_LAUNCHERS

PACKAGE = "hydra_plugins.qtorch"


def register_plugins() -> None:
    """Before Hydra runs; again is as good as once."""
    known = Plugins.instance().class_name_to_class
    ours: tuple[type[Plugin], ...] = (OptunaSweeper, RayLauncher, *SUBMITIT_LAUNCHERS)
    for plugin in ours:
        known[f"{PACKAGE}.{plugin.__name__}"] = plugin
