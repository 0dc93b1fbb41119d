"""The data source that a handler or loader reads."""

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
    """Build a source from a Source, a configuration, a folder of Qlib files, a frame or a Panel."""
    config = plain(config)
    if isinstance(config, Mapping):
        source = init_instance_by_config(config, "qtorch.data.source", accept_types=Source)
        return as_source(source)
    if isinstance(config, str) or hasattr(config, "__fspath__"):
        return QlibSource(config)
    return as_source(config)


def default_source() -> Source:
    """Return the source of `qtorch.init(provider_uri=...)`; raise ConfigError if none is set."""
    if session().provider_uri is None:
        raise ConfigError(
            "no data source: pass source=... to the handler (QlibSource, TableSource, "
            "SyntheticSource), or call qtorch.init(provider_uri='/path/to/qlib_data') first."
        )
    return build_source(session().provider_uri)
