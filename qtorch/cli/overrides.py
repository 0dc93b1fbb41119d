"""Keep the secrets of URLs out of what Hydra shows and writes: overrides, .hydra, multirun.yaml.

The overrides that Hydra gets contain redacted URLs. The complete ones are in the memory of the
command, and in an environment variable for the processes that a launcher starts.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra.core.utils
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from qtorch.core.files import write_private
from qtorch.core.secrets import (
    MASK,
    URLS_VARIABLE,
    complete_tree,
    complete_url,
    is_secret_name,
    redact_secrets,
    redact_urls,
    url_variables,
)
from qtorch.core.session import resolve_path

# `~` at the beginning of a value, of an item of a list or mapping, or of the path of a URI.
_HOME = re.compile(r"([=\[,:]\s*|://+)~(?=[/,\]}]|$)")
SHOW_OPTIONS = ("--cfg", "-c", "--info", "-i")  # Hydra prints the configuration


def expand_home(words: Sequence[str]) -> list[str]:
    """Return the words of a command with the home folder for `~` at the beginning of a value.

    Shells leave it in `data.path=~/bars`, and Hydra's grammar has no such character.
    """
    return [_expand_home(word) for word in words]


def _expand_home(word: str) -> str:
    home = str(resolve_path("~"))
    if not word.startswith("-"):  # an override, in which these characters have a meaning
        home = re.sub(r"[\\()\[\]{}:=,]", r"\\\g<0>", home)
    return _HOME.sub(lambda match: f"{match[1]}{home}", word)


@contextmanager
def redact_overrides(argv: Sequence[str]) -> Iterator[list[str]]:
    """Yield the words of a command without secrets, which its jobs can complete meanwhile."""
    previous = os.environ.get(URLS_VARIABLE)
    words = [_redact_override(word) for word in argv]
    os.environ.update(url_variables())
    try:
        yield words
    finally:
        os.environ.pop(URLS_VARIABLE, None)
        if previous is not None:
            os.environ[URLS_VARIABLE] = previous


def quote_value(text: str) -> str:
    """Quote a text as the value of an override."""
    quoted: str = QuotedString(text, Quote.single).with_quotes()
    return quoted


def _redact_override(word: str) -> str:
    if redact_urls(word) == word:
        return word
    key, _, text = word.partition("=")
    try:
        value = OverridesParser.create().parse_override(word).value()
    except HydraException:
        value = text  # a character in the password needs quotes, but that is clear enough
    if isinstance(value, str):
        complete_url(value)
        return f"{key}={quote_value(redact_urls(value))}"
    complete_tree(_plain_value(value))
    return redact_urls(word)


def _plain_value(value: Any) -> Any:
    """Convert a parsed value to texts, lists and dicts of them."""
    if isinstance(value, ChoiceSweep):
        return [_plain_value(v) for v in value.list]
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain_value(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain_value(v) for k, v in value.items()}
    return value


def redact_config(config: DictConfig | ListConfig) -> None:
    """Redact the URLs in a sweep's configuration in place; its jobs can complete them.

    Hydra saves it as multirun.yaml, and launchers send it to other processes. The jobs compose
    their configurations anew.
    """
    _redact_nodes(config)
    os.environ.update(url_variables())


def _redact_nodes(node: DictConfig | ListConfig) -> None:
    for key in list(node) if isinstance(node, DictConfig) else range(len(node)):
        if OmegaConf.is_missing(node, key):
            continue
        with contextlib.suppress(OmegaConfBaseException):  # a value that jobs alone can resolve
            value = node[key]
            if isinstance(value, DictConfig | ListConfig):
                if not OmegaConf.is_interpolation(node, key):
                    _redact_nodes(value)
            elif isinstance(value, str) and redact_urls(value) != value:
                complete_url(value)
                with read_write(node):
                    node[key] = redact_urls(value)


def save_config(cfg: DictConfig, filename: str, output_dir: Path) -> None:
    """Save a job's configuration in `.hydra`, without secrets, for the user alone."""
    plain = _redact_values(OmegaConf.to_container(cfg, resolve=False, enum_to_str=True))
    write_private(output_dir / filename, OmegaConf.to_yaml(OmegaConf.create(plain)))


def _redact_values(value: Any, name: str = "") -> Any:
    """Redact the texts in a configuration, and all of a value whose name says that it is secret."""
    if isinstance(value, dict):
        return {key: _redact_values(part, str(key)) for key, part in value.items()}
    if isinstance(value, list):
        return [_redact_values(part) for part in value]
    if not isinstance(value, str) or value == "???" or value.startswith("${"):
        return value
    return MASK if is_secret_name(name) else redact_secrets(value)


def replace_config_writer() -> None:
    """Let Hydra save configurations by `save_config`: it has no setting for it."""
    assert callable(hydra.core.utils._save_config)
    hydra.core.utils._save_config = save_config


@contextmanager
def redact_output(argv: Sequence[str]) -> Iterator[None]:
    """Redact what Hydra prints inside the block, if it is to show the configuration."""
    if not any(word.partition("=")[0] in SHOW_OPTIONS for word in argv):
        yield
        return
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            yield
    finally:
        print(redact_urls(output.getvalue()), end="")
