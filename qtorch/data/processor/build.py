"""Processors from what a configuration says."""

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
    """A processor from its configuration, bare name, or object.

    Qlib's `{"class": "Fillna", "kwargs": {...}}`, `{"_target_": ...}` and bare names of
    `qtorch.data.processor` all work. A callable that is no Processor is taken as a pandas
    processor of Qlib's protocol.
    """
    config = plain(config)
    if isinstance(config, Processor):
        return config
    if not isinstance(config, str | Mapping | Path):
        return PandasProcessor(config)
    made = init_instance_by_config(config, MODULE)
    if isinstance(made, Processor):
        return made
    return PandasProcessor(config)


def build_processors(configs: Sequence[Any] | None, argument: str) -> list[Processor]:
    """A list of processors; `argument` names it in an error."""
    if configs is None:
        return []
    configs = plain(configs)
    if isinstance(configs, str | Mapping) or not isinstance(configs, Sequence):
        raise ConfigError(
            f"{argument} must be a list of processors, got {configs!r:.80}; write [{{...}}]."
        )
    return [build_processor(c) for c in configs]
