"""Which source a handler or loader reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtorch.core.errors import ConfigError
from qtorch.core.instantiate import init_instance_by_config, plain
from qtorch.core.session import session
from qtorch.data.source.base import Source
from qtorch.data.source.frame import as_source
from qtorch.data.source.qlib import QlibSource


def build_source(config: Any) -> Source:
    """A source from itself, its configuration, a folder of Qlib's files, a frame or a Panel."""
    config = plain(config)
    if isinstance(config, Mapping):
        made = init_instance_by_config(config, "qtorch.data.source", accept_types=Source)
        return as_source(made)
    if isinstance(config, str) or hasattr(config, "__fspath__"):
        return QlibSource(config)
    return as_source(config)


def default_source() -> Source:
    """The source of `qtorch.init(provider_uri=...)`; a ConfigError where none was set."""
    if session().provider_uri is None:
        raise ConfigError(
            "no data source: give the handler source=... (QlibSource, TableSource, "
            "SyntheticSource), or call qtorch.init(provider_uri='/path/to/qlib_data') first."
        )
    return build_source(session().provider_uri)
