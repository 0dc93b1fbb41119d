"""`qtorch data`: import bars into Qlib's format, describe a source, manage the feature cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qtorch.cli.compose import compose_settings
from qtorch.cli.signals import handle_stop_signals
from qtorch.core.errors import ConfigError, unknown_name
from qtorch.core.instantiate import init_instance_by_config
from qtorch.core.runtime import configure_logging
from qtorch.core.wording import format_count

USAGE = """\
qtorch data: import and inspect bars

usage: qtorch data import   data=table data.path=bars.parquet out=FOLDER
       qtorch data describe data=qlib data.provider_uri=FOLDER [universe=all] [out=bars.png]
       qtorch data cache    [clear | remove KEY ...] [folder=FOLDER]

  import    write any source in Qlib's format: calendars, instruments, features/*.bin
  describe  print dates, instruments, gaps and large moves, and save a chart
  cache     list or remove the features that handlers cache on disk (cache=true)

  data is synthetic, qlib, table, or your own config file in --config-dir DIR/data.
"""


def main(argv: Sequence[str]) -> int:
    """Run `import`, `describe` or `cache`."""
    if not argv or any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0 if argv else 2
    actions = {"import": _import, "describe": _describe}
    if argv[0] not in (*actions, "cache"):
        raise ConfigError(unknown_name("data command", argv[0], (*actions, "cache")))
    configure_logging()
    if argv[0] == "cache":
        from qtorch.cli.cache import run_cache

        return run_cache(argv[1:])
    settings = compose_settings("bars", argv[1:])
    with handle_stop_signals():
        return actions[argv[0]](settings)


def _import(settings: dict[str, Any]) -> int:
    from qtorch.data.source.qlib_writer import write_qlib

    if settings["out"] is None:
        raise ConfigError("out must be given: add out=FOLDER, the folder to write.")
    folder = Path(settings["out"]).expanduser()
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
    out = Path(settings["out"] or "bars.png").expanduser()
    if out.suffix != ".png":
        raise ConfigError(f"out={out}: expected a name that ends in .png.")
    description = describe(source, universe=settings["universe"], freq=settings["freq"])
    print(description.text())
    description.plot().savefig(out, dpi=130)
    print(f"saved chart to {out}")
    return 0
