"""`qtorch data cache`: manage the features that handlers cache on disk."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from qtorch.core.errors import ArgumentError, ConfigError, unknown_name
from qtorch.core.wording import format_count
from qtorch.data.feature_cache import Entry, FeatureCache


def run_cache(argv: Sequence[str]) -> int:
    """List the entries, remove some by key (or key prefix), or clear the cache."""
    words = [a for a in argv if not a.startswith("folder=")]
    folders = [a.partition("=")[2] for a in argv if a.startswith("folder=")]
    cache = FeatureCache(folders[-1] if folders else None)
    if not words:
        _print_entries(cache)
    elif words == ["clear"]:
        num_bytes = sum(e.num_bytes for e in cache.entries())
        count_text = format_count(cache.clear(), "entry", "entries")
        print(f"{count_text} removed, {_format_size(num_bytes)} freed")
    elif words[0] == "remove" and len(words) > 1:
        for key in _select_keys(words[1:], cache.entries()):
            cache.remove(key)
            print(f"removed {key}")
    elif words[0] == "remove":
        raise ArgumentError("remove needs a key: qtorch data cache remove KEY (or a prefix of it).")
    else:
        raise ConfigError(unknown_name("cache command", words[0], ("clear", "remove")))
    return 0


def _select_keys(prefixes: Sequence[str], entries: Sequence[Entry]) -> list[str]:
    keys = [e.key for e in entries]
    selection = []
    for prefix in prefixes:
        matches = [k for k in keys if k.startswith(prefix)]
        if len(matches) != 1:
            problem = (
                format_count(len(matches), "entry starts", "entries start")
                if matches
                else "no entry starts"
            )
            raise ConfigError(f"{problem} with {prefix!r}; list the keys with qtorch data cache.")
        selection.append(matches[0])
    return selection


def _print_entries(cache: FeatureCache) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    entries = cache.entries()
    total = sum(e.num_bytes for e in entries)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    if entries:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("key", "source", "universe", "dates"):
            table.add_column(name, overflow="fold")
        for name in ("columns", "size", "last used"):
            table.add_column(name, justify="right")
        for entry in entries:
            summary = entry.summary
            table.add_row(
                entry.key,
                str(summary.get("source")),
                str(summary.get("universe")),
                "..".join(summary.get("span", ())),
                str(summary.get("columns")),
                _format_size(entry.num_bytes),
                _format_age(entry.last_used),
            )
        console.print(table)
    console.print(
        f"{format_count(len(entries), 'entry', 'entries')}, {_format_size(total)} of at most "
        f"{_format_size(cache.max_bytes)} in {cache.folder}",
        soft_wrap=True,
    )


def _format_size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def _format_age(timestamp: float) -> str:
    seconds = max(0.0, time.time() - timestamp)
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
