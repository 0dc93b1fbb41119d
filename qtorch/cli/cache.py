"""`qtorch data cache`: the features that handlers keep on disk."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from qtorch.core.errors import ArgumentError, ConfigError, unknown_name
from qtorch.core.wording import counted
from qtorch.data.feature_cache import Entry, FeatureCache


def run_cache(argv: Sequence[str]) -> int:
    """Show the entries, remove some by key (or the key's beginning), or clear all."""
    words = [a for a in argv if not a.startswith("folder=")]
    folders = [a.partition("=")[2] for a in argv if a.startswith("folder=")]
    cache = FeatureCache(folders[-1] if folders else None)
    if not words:
        _show(cache)
    elif words == ["clear"]:
        freed = sum(e.num_bytes for e in cache.entries())
        removed = counted(cache.clear(), "entry", "entries")
        print(f"{removed} removed, {_size(freed)} freed")
    elif words[0] == "remove" and len(words) > 1:
        for key in _chosen(words[1:], cache.entries()):
            cache.remove(key)
            print(f"removed {key}")
    elif words[0] == "remove":
        raise ArgumentError("remove what? qtorch data cache remove KEY (or its beginning).")
    else:
        raise ConfigError(unknown_name("cache command", words[0], ("clear", "remove")))
    return 0


def _chosen(given: Sequence[str], entries: Sequence[Entry]) -> list[str]:
    keys = [e.key for e in entries]
    chosen = []
    for start in given:
        found = [k for k in keys if k.startswith(start)]
        if len(found) != 1:
            what = (
                counted(len(found), "entry begins", "entries begin") if found else "no entry begins"
            )
            raise ConfigError(f"{what} with {start!r}; qtorch data cache lists the keys.")
        chosen.append(found[0])
    return chosen


def _show(cache: FeatureCache) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    entries = cache.entries()
    total = sum(e.num_bytes for e in entries)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    if entries:
        shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("key", "source", "universe", "dates"):
            shown.add_column(name, overflow="fold")
        for name in ("columns", "size", "last used"):
            shown.add_column(name, justify="right")
        for entry in entries:
            about = entry.about
            shown.add_row(
                entry.key,
                str(about.get("source")),
                str(about.get("universe")),
                "..".join(about.get("span", ())),
                str(about.get("columns")),
                _size(entry.num_bytes),
                _ago(entry.used),
            )
        console.print(shown)
    console.print(
        f"{counted(len(entries), 'entry', 'entries')}, {_size(total)} of at most "
        f"{_size(cache.max_bytes)} in {cache.folder}",
        soft_wrap=True,
    )


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def _ago(stamp: float) -> str:
    seconds = max(0.0, time.time() - stamp)
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
