"""Building processors from configurations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qtorch.core.errors import ConfigError
from qtorch.core.instantiate import init_instance_by_config, plain
from qtorch.data.processor.base import Processor
from qtorch.data.processor.pandas_processor import PandasProcessor

MODULE = "qtorch.data.processor"


def build_processor(config: Any) -> Processor:
    """Build a processor from a configuration, a class name, or an object.

    Accepts Qlib's `{"class": "Fillna", "kwargs": {...}}`, `{"_target_": ...}`, and the names of
    classes in `qtorch.data.processor`. A callable that is not a Processor is treated as a pandas
    processor with Qlib's protocol.
    """
    config = plain(config)
    if isinstance(config, Processor):
        return config
    if not isinstance(config, str | Mapping | Path):
        return PandasProcessor(config)
    instance = init_instance_by_config(config, MODULE)
    if isinstance(instance, Processor):
        return instance
    return PandasProcessor(config)


def build_processors(configs: Sequence[Any] | None, argument: str) -> list[Processor]:
    """Build a list of processors; `argument` is its name in error messages."""
    if configs is None:
        return []
    configs = plain(configs)
    if isinstance(configs, str | Mapping) or not isinstance(configs, Sequence):
        raise ConfigError(
            f"{argument} must be a list of processors, got {configs!r:.80}; write [{{...}}]."
        )
    return [build_processor(c) for c in configs]
