"""`qtorch train`: compose a task from conf/ and overrides, run it or a sweep, print the results.

`qtorch run` uses the same jobs with the task of a workflow file.
"""

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

from qtorch.cli.compose import (
    ROOT_CONFIG,
    check_words,
    config_path,
    select_fleet,
    translate_hydra_errors,
)
from qtorch.cli.guard import INTERRUPTED, handle_stop_signals
from qtorch.cli.jobs.job import run_job
from qtorch.cli.jobs.results import KILLED, command_results
from qtorch.cli.jobs.sweep_command import (
    SweepCommand,
    SweepStartError,
    close_sweep,
    current_sweep,
)
from qtorch.cli.launchers.plugins import register_plugins
from qtorch.cli.launchers.run_mode import replace_mode_search
from qtorch.cli.launchers.slurm import requeue_slurm_job
from qtorch.cli.overrides import expand_home, redact_output, redact_overrides, replace_config_writer
from qtorch.cli.tables.console import print_table
from qtorch.cli.tables.jobs import jobs_table
from qtorch.core.errors import format_count, printable_text

_OVERRIDE = re.compile(r"[^-=][^=]*=|~")
# Our launcher configs have the names of Hydra's plugins, and Hydra warns that it validates them
# against the plugins' schemas. The filter is set at import, so that launcher workers get it too.
warnings.filterwarnings("ignore", message=r".*\n?.*validated against ConfigStore schema")
replace_config_writer()  # likewise
replace_mode_search()
# Hydra composes its help without the root configuration, so the template cannot be chosen there.
HYDRA_HELP = {"--hydra-help": "hydra/hydra_help=qtorch"}


def main(argv: Sequence[str], root: str = ROOT_CONFIG) -> int:
    """Run the jobs; return 0 if every job finished, 130 after Ctrl-C, otherwise 1.

    `root` is the root configuration of the command: train, or run for a workflow file.
    """
    command_results.clear()
    register_plugins()
    try:
        outcome = _run_jobs(argv, root)
        if isinstance(outcome, int):
            return outcome
        return _report_results(outcome)
    finally:
        close_sweep()


def _run_jobs(argv: Sequence[str], root: str) -> BaseException | int | None:
    """Run all jobs through Hydra.

    Return the exception that kept jobs from running to their end, if any; or an exit code if no job
    was requested (--help).
    """
    try:
        return _run_hydra(argv, root)
    except Exception as error:
        if _get_started_sweep() is None:
            raise
        return error  # the launcher failed: the results of its jobs are printed nevertheless


def _run_hydra(argv: Sequence[str], root: str) -> BaseException | int | None:
    check_words(argv)
    with (
        redact_overrides(select_fleet(expand_home(argv))) as words,
        _patch_arguments(words, root),
        handle_stop_signals(),
        translate_hydra_errors(words, root),
        redact_output(words),
    ):
        try:
            hydra.main(version_base="1.3", config_path=str(config_path()), config_name=root)(
                _run_job
            )()
        except KeyboardInterrupt as stop:
            return stop
        except SystemExit as end:
            if _get_started_sweep() is not None:
                return end  # a stop signal from a scheduler
            return end.code if isinstance(end.code, int) else 0  # --help or an invalid option
        except SweepStartError as refusal:
            if refusal.__cause__ is None:
                raise
            raise refusal.__cause__ from None
        finally:
            GlobalHydra.instance().clear()
    return None


def _get_started_sweep() -> SweepCommand | None:
    sweep = current_sweep()
    return None if sweep is None or sweep.recorder is None else sweep


def _report_results(interruption: BaseException | None) -> int:
    """Print the results of the jobs and return the exit code.

    `interruption` is the exception that kept jobs from running to their end.
    """
    jobs = command_results.all()
    if any(j.pool_task for j in jobs) and interruption is None:
        from qtorch.cli.jobs.pool_jobs import wait_for_pool_jobs

        with handle_stop_signals():
            wait_for_pool_jobs(jobs)
    sweep = _get_started_sweep()
    if sweep is not None:
        return sweep.finish(jobs, interruption)
    if any(j.pool_task for j in jobs):
        print_table(jobs_table(format_count(len(jobs), "job"), jobs))
    if interruption is not None:
        requeue_text = requeue_slurm_job()
        if requeue_text is not None:
            # Drop the hint on resuming by hand.
            first_sentence = str(interruption).partition(". ")[0].rstrip(".")
            raise KeyboardInterrupt(f"{first_sentence}. {requeue_text}")
        raise interruption
    for failed_job in (j for j in jobs if j.error):
        print(f"error: {printable_text(str(failed_job.error))}", file=sys.stderr)
    if any(j.status == KILLED for j in jobs):
        return INTERRUPTED
    return int(any(j.error for j in jobs))


def _run_job(config: DictConfig) -> None:
    """Run one job. Stands here because launcher workers import this module, with its filter."""
    register_plugins()  # Hydra starts a worker with the installed plugins only
    run_job(config)


@contextmanager
def _patch_arguments(argv: Sequence[str], root: str) -> Iterator[None]:
    """Set sys.argv, which Hydra reads, and HYDRA_FULL_ERROR, without which it hides exceptions."""
    original_argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    # argparse accepts the overrides only as one contiguous block; allow them before options too.
    overrides = [a for a in argv if _OVERRIDE.match(a)]
    overrides += [choice for option, choice in HYDRA_HELP.items() if option in argv]
    sys.argv = [f"qtorch {root}", *(a for a in argv if not _OVERRIDE.match(a)), *overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = original_argv
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error
