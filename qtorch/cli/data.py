"""`qtorch data`: import bars into Qlib's format, describe a source, manage the feature cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from qtorch.cli.compose import compose_settings
from qtorch.cli.guard import configure_process, handle_stop_signals
from qtorch.core.errors import (
    ArgumentError,
    ConfigError,
    format_count,
    printable_text,
    unknown_name_message,
)
from qtorch.core.instantiate import init_instance_by_config
from qtorch.core.session import resolve_path
from qtorch.data.handler.feature_cache import Entry, FeatureCache

USAGE = """\
qtorch data: import and inspect bars

usage: qtorch data import   data=table data.path=bars.parquet out=FOLDER
       qtorch data describe data=qlib data.provider_uri=FOLDER [universe=all] [out=bars.png]
       qtorch data cache    [clear | remove KEY ... | verify] [folder=FOLDER]

  import    write any source in Qlib's format: calendars, instruments, features/*.bin
  describe  print dates, instruments, gaps and large moves, and save a chart
  cache     list or remove the features that handlers cache on disk (cache=true); verify compares
            all of them with their checksums, and removes damaged ones

  data is synthetic, qlib, table, or your own config file in --config-dir DIR/data.
"""


def main(argv: Sequence[str]) -> int:
    """Run `import`, `describe` or `cache`."""
    actions = {"import": _import, "describe": _describe}
    if argv[0] not in (*actions, "cache"):
        raise ConfigError(unknown_name_message("data command", argv[0], (*actions, "cache")))
    configure_process()
    if argv[0] == "cache":
        return run_cache(argv[1:])
    settings = compose_settings("bars", argv[1:])
    with handle_stop_signals():
        return actions[argv[0]](settings)


def _import(settings: dict[str, Any]) -> int:
    from qtorch.data.source.writer import write_qlib

    if settings["out"] is None:
        raise ConfigError("out must be given: add out=FOLDER, the folder to write.")
    folder = resolve_path(settings["out"])
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"out={folder} exists and is not empty; choose a new folder.")
    source = init_instance_by_config(settings["data"])
    write_qlib(source, folder, freq=settings["freq"])
    calendar = source.calendar(freq=settings["freq"])
    print(
        f"{format_count(len(source.instruments()), 'instrument')}, "
        f"{format_count(len(calendar), 'date')} "
        f"{calendar[0]:%Y-%m-%d}..{calendar[-1]:%Y-%m-%d} in {folder}\n"
        f"use it with: qtorch train data=qlib data.provider_uri={folder}"
    )
    return 0


def _describe(settings: dict[str, Any]) -> int:
    from qtorch.data.describe import describe

    source = init_instance_by_config(settings["data"])
    out = resolve_path(settings["out"] or "bars.png")
    if out.suffix != ".png":
        raise ConfigError(f"out={out}: expected a name that ends in .png.")
    description = describe(source, universe=settings["universe"], freq=settings["freq"])
    print(printable_text(description.text()))
    description.plot().savefig(out, dpi=130)
    print(f"saved chart to {out}")
    return 0


def run_cache(argv: Sequence[str]) -> int:
    """List the entries, remove some by key (or key prefix), clear the cache, or verify it.

    Returns 1 if `verify` has found damaged entries.
    """
    words = [a for a in argv if not a.startswith("folder=")]
    folders = [a.partition("=")[2] for a in argv if a.startswith("folder=")]
    cache = FeatureCache(folders[-1] if folders else None)
    if not words:
        _print_entries(cache)
    elif words == ["clear"]:
        num_bytes = sum(e.num_bytes for e in cache.entries())
        count_text = format_count(cache.clear(), "entry", "entries")
        print(f"{count_text} removed, {_format_size(num_bytes)} freed")
    elif words == ["verify"]:
        return _verify_cache(cache)
    elif words[0] == "remove" and len(words) > 1:
        for key in _select_keys(words[1:], cache.entries()):
            cache.remove(key)
            print(f"removed {key}")
    elif words[0] == "remove":
        raise ArgumentError("remove needs a key: qtorch data cache remove KEY (or a prefix of it).")
    else:
        commands = ("clear", "remove", "verify")
        raise ConfigError(unknown_name_message("cache command", words[0], commands))
    return 0


def _verify_cache(cache: FeatureCache) -> int:
    """Remove the damaged entries, and print their names; return the exit code."""
    num_entries = len(cache.keys())
    problems = cache.find_damage()
    for key, problem in problems.items():
        cache.remove(key)
        print(f"removed {key}: {problem}")
    print(
        f"{format_count(num_entries, 'entry', 'entries')} in {cache.folder}, "
        f"{len(problems)} of them damaged"
        + (" and removed; their features are computed again on next use" if problems else "")
    )
    return 1 if problems else 0


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
    from qtorch.cli.tables.console import new_table, print_table, terminal

    entries = cache.entries()
    total = sum(e.num_bytes for e in entries)
    if entries:
        numbers = ("columns", "size", "last used")
        table = new_table("key", "source", "universe", "dates", *numbers, numbers=numbers)
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
        print_table(table)
    terminal().print(
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
