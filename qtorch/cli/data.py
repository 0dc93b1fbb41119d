"""`qtorch data`: bring bars into Qlib's layout, see what is there, and the features kept of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qtorch.cli.compose import composed
from qtorch.cli.signals import interruptible
from qtorch.core.errors import ConfigError, unknown_name
from qtorch.core.instantiate import init_instance_by_config
from qtorch.core.runtime import configure_logging
from qtorch.core.wording import counted

USAGE = """\
qtorch data: bars in, bars seen

usage: qtorch data import   data=table data.path=bars.parquet out=FOLDER
       qtorch data describe data=qlib data.provider_uri=FOLDER [universe=all] [out=bars.png]
       qtorch data cache    [clear | remove KEY ...] [folder=FOLDER]

  import    writes any source in Qlib's own layout: calendars, instruments, features/*.bin
  describe  dates, instruments, holes and large moves, in words and as a picture
  cache     the features that handlers keep on disk (cache=true): shows them, clears them

  data is synthetic, qlib, table, or a file of your own in --config-dir DIR/data.
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
    settings = composed("bars", argv[1:])
    with interruptible():
        return actions[argv[0]](settings)


def _import(settings: dict[str, Any]) -> int:
    from qtorch.data.source.qlib_writer import write_qlib

    if settings["out"] is None:
        raise ConfigError("out must be given: out=FOLDER, where the data goes.")
    folder = Path(settings["out"]).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"out={folder} exists and is not empty; name a new folder.")
    source = init_instance_by_config(settings["data"])
    write_qlib(source, folder, freq=settings["freq"])
    calendar = source.calendar(freq=settings["freq"])
    print(
        f"{counted(len(source.instruments()), 'instrument')}, {counted(len(calendar), 'date')} "
        f"{calendar[0]:%Y-%m-%d}..{calendar[-1]:%Y-%m-%d} in {folder}\n"
        f"use it: qtorch train data=qlib data.provider_uri={folder}"
    )
    return 0


def _describe(settings: dict[str, Any]) -> int:
    from qtorch.data.describe import describe

    source = init_instance_by_config(settings["data"])
    out = Path(settings["out"] or "bars.png").expanduser()
    if out.suffix != ".png":
        raise ConfigError(f"out={out}: the picture is a .png file.")
    description = describe(source, universe=settings["universe"], freq=settings["freq"])
    print(description.text())
    description.picture().savefig(out, dpi=130)
    print(f"picture: {out}")
    return 0
