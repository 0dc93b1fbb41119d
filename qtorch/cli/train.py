"""`qtorch train`: compose a task from conf/ and overrides, run it (or a sweep), tell the result."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from qtorch.cli.config_path import ROOT_CONFIG, config_path
from qtorch.cli.guard import INTERRUPTED
from qtorch.cli.hydra_errors import explained
from qtorch.cli.plugins import register_plugins
from qtorch.cli.signals import interruptible
from qtorch.cli.sweep import KILLED, Refusal, finished_jobs, forget_jobs

_OVERRIDE = re.compile(r"[^-=][^=]*=|~")
# Our launcher groups have their plugins' names, and are checked against those; a launcher's workers
# import this module too.
warnings.filterwarnings("ignore", message=r".*\n?.*validated against ConfigStore schema")
# Hydra composes its help without the root configuration, which could say so.
HYDRA_HELP = {"--hydra-help": "hydra/hydra_help=qtorch"}


def main(argv: Sequence[str]) -> int:
    """Run what the overrides ask for; 0 where every job finished, 130 after Ctrl-C, else 1."""
    forget_jobs()
    many = any(a in ("-m", "--multirun") for a in argv)
    register_plugins()
    try:
        ended = _launched(argv)
        if isinstance(ended, int):
            return ended
        return _told(many, ended)
    finally:
        if "qtorch.cli.sweep_start" in sys.modules:
            from qtorch.cli.sweep_start import forget_sweep

            forget_sweep()


def _launched(argv: Sequence[str]) -> BaseException | int | None:
    """Hydra's part: every job has ended after it, or what has kept some from it is returned.

    An exit code where there were no jobs (--help).
    """
    try:
        return _composed_and_run(argv)
    except Exception as error:
        if not _sweep_has_begun():
            raise
        return error  # of a launcher: what its jobs came to is told nevertheless


def _composed_and_run(argv: Sequence[str]) -> BaseException | int | None:
    with _as_program(argv), interruptible(), explained(argv):
        try:
            hydra.main(version_base="1.3", config_path=str(config_path()), config_name=ROOT_CONFIG)(
                _run
            )()
        except KeyboardInterrupt as stop:
            return stop
        except SystemExit as end:
            if _sweep_has_begun():
                return end  # a scheduler's notice
            return end.code if isinstance(end.code, int) else 0  # --help, a wrong option
        except Refusal as refusal:
            if refusal.__cause__ is None:
                raise
            raise refusal.__cause__ from None
        finally:
            GlobalHydra.instance().clear()
    return None


def _sweep_has_begun() -> bool:
    if "qtorch.cli.sweep_start" not in sys.modules:
        return False
    from qtorch.cli.sweep_start import the_sweep

    sweep = the_sweep()
    return sweep is not None and sweep.recorder is not None


def _told(many: bool, interrupted: BaseException | None) -> int:
    """What the jobs came to, on the terminal and as an exit code; `interrupted`, what kept some
    from their end."""
    jobs = finished_jobs()
    if any(j.sent for j in jobs) and interrupted is None:
        from qtorch.cli.sent import await_jobs

        with interruptible():
            await_jobs(jobs)
    if many:
        from qtorch.cli.sweep_end import end

        return end(jobs, interrupted)
    if any(j.sent for j in jobs):
        from qtorch.cli.table import print_jobs

        print_jobs(jobs)
    if interrupted is not None:
        from qtorch.cli.scheduled import queued_again

        told = queued_again()
        if told is not None:
            kept = str(interrupted).partition(". ")[0].rstrip(".")  # without how to go on by hand
            raise KeyboardInterrupt(f"{kept}. {told}")
        raise interrupted
    for failed in (j for j in jobs if j.error):
        print(f"error: {failed.error}", file=sys.stderr)
    if any(j.status == KILLED for j in jobs):
        return INTERRUPTED
    return int(any(j.error for j in jobs))


def _run(config: DictConfig) -> None:
    """Imported with the first job: composing, --cfg and --help need no torch."""
    from qtorch.cli.job import run_job

    run_job(config)


@contextmanager
def _as_program(argv: Sequence[str]) -> Iterator[None]:
    """Hydra reads sys.argv, and hides its exceptions unless told not to."""
    before, variable = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    # argparse takes overrides in one stretch only; here they may stand before options too.
    overrides = [a for a in argv if _OVERRIDE.match(a)]
    overrides += [choice for option, choice in HYDRA_HELP.items() if option in argv]
    sys.argv = ["qtorch train", *(a for a in argv if not _OVERRIDE.match(a)), *overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = before
        if variable is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = variable
