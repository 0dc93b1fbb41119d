"""`hydra/launcher=ray`: run the jobs of a sweep as tasks of a Ray cluster.

Hydra's own Ray launcher requires package versions that conflict with MLflow's. This one does what a
sweep needs: resources per job, one process per job, and retries for a job whose worker or node
died.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from qtorch.cli.guard import handle_stop_signals
from qtorch.cli.launchers.base import Jobs, UnfinishedJobsMixin
from qtorch.cli.launchers.kinds import OwnProcessLauncher
from qtorch.core.errors import ConfigError, install_command
from qtorch.core.instantiate import resolve_config
from qtorch.core.runtime import gpu_share_variables
from qtorch.core.secrets import is_secret_name, redact_urls
from qtorch.process.stops import SCHEDULER_SIGNALS, received_signals

log = logging.getLogger(__name__)

# Set before Ray is imported: no usage statistics, and no merging of equal log lines of jobs.
RAY_VARIABLES = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
# A cluster that this command starts listens on loopback only, and its jobs run at normal priority.
LOCAL_CLUSTER_VARIABLES = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_worker_niceness": "0"}
CONNECT_SECONDS = 5.0
STOP_SECONDS = 60.0


class RayLauncher(UnfinishedJobsMixin, OwnProcessLauncher, Launcher):
    """Runs each job in its own Ray worker, on a running cluster or on one started for the sweep.

    The arguments are those of conf/hydra/launcher/ray.yaml. The sweep's folder must be on a path
    that all nodes can access, because each job writes its result there.
    """

    def __init__(
        self,
        address: str | None,
        num_cpus: float,
        num_gpus: float,
        memory: int | None,
        max_retries: int,
        env_vars: Mapping[str, Any] | None,
        init: Mapping[str, Any] | None,
        remote: Mapping[str, Any] | None,
    ) -> None:
        self.address, self.max_retries = address, int(max_retries)
        self.num_cpus, self.num_gpus, self.memory = num_cpus, num_gpus, memory
        self._is_connection_owner = False  # whether this process opened the connection
        # A sweeper that launches several batches sets this, and closes the launcher at the end.
        self.keep_connection = False
        self.env_vars, self.init, self.remote = (
            dict(resolve_config(options) or {}) for options in (env_vars, init, remote)
        )

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Store the context, function and configuration, as Hydra requires."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def _run_jobs(self, jobs: Jobs) -> dict[int, JobReturn]:
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        ray = self._connect()
        try:
            return self._run_tasks(ray, jobs)
        finally:
            if not self.keep_connection:
                self.close()

    def close(self) -> None:
        """Disconnect from the cluster, and stop it if it was started for this command."""
        if self._is_connection_owner:
            import ray

            self._is_connection_owner = False
            ray.shutdown()

    def _connect(self) -> Any:
        """Connect to the cluster and return the ray module."""
        local = self.address in (None, "local")
        for name, value in {**RAY_VARIABLES, **(LOCAL_CLUSTER_VARIABLES if local else {})}.items():
            os.environ.setdefault(name, value)
        try:
            import ray
        except ImportError as error:
            raise ConfigError(
                f"hydra/launcher=ray requires Ray: {install_command('ray')}."
            ) from error
        if ray.is_initialized():
            return ray
        options: dict[str, Any] = {"log_to_driver": True, "logging_level": "warning"}
        if local:
            options |= {"address": "local", "include_dashboard": False}
        else:
            options["address"] = self.address
        try:
            _check_address(str(self.address))
            with _keep_sigterm_handler():
                ray.init(**{**options, **self.init})
        except (ConnectionError, OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"no Ray cluster at hydra.launcher.address={self.address}: {error}. Start one with "
                "`ray start --head`, or omit the address to start one for this sweep."
            ) from error
        self._is_connection_owner = True
        return ray

    def _run_tasks(self, ray: Any, jobs: Jobs) -> dict[int, JobReturn]:
        environment, secret_variables = _split_secrets(self._environment())
        options = {
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus,
            "max_retries": self.max_retries,
            "max_calls": 1,  # one process per job, so that no state leaks into the next job
            "runtime_env": {"env_vars": environment},
            **({} if self.memory is None else {"memory": self.memory}),
            **self.remote,
        }
        task = ray.remote(**options)(run_in_worker)
        state = ray.put(Singleton.get_state())
        results = {}
        for number, overrides in jobs.items():
            log.info("\t#%d : %s", number, " ".join(o for o in overrides if "hydra." not in o))
            results[number] = task.remote(
                number,
                overrides,
                self.hydra_context,
                self.config,
                self.task_function,
                state,
                os.getcwd(),
                secret_variables,
            )
        try:
            return {n: self._job_return(ray, result, n, jobs[n]) for n, result in results.items()}
        except BaseException as stop:
            for result in results.values():
                ray.cancel(result, force=False)
            if not isinstance(stop, Exception):  # Ctrl-C: give the jobs time to write a checkpoint
                ray.wait(list(results.values()), num_returns=len(results), timeout=STOP_SECONDS)
            raise

    def _job_return(
        self, ray: Any, result_ref: Any, number: int, overrides: Sequence[str]
    ) -> JobReturn:
        try:
            job_return: JobReturn = ray.get(result_ref)
            return job_return
        except ray.exceptions.RayError as error:
            reason = f"Ray lost the job (max_retries={self.max_retries}): {_failure_text(error)}"
            return self._record_lost_job(number, overrides, reason)

    def _environment(self) -> dict[str, str]:
        """Return the variables with which a worker finds this code and the same stores."""
        paths = [p for p in sys.path if p and Path(p).is_dir()]
        code_folder = str(Path(__file__).resolve().parents[2])
        path = (
            os.pathsep.join(dict.fromkeys([code_folder, *paths])) if code_folder in paths else None
        )
        prefixes = ("QTORCH_", "MLFLOW_", "OMP_", "HYDRA_", "AWS_", "DO_NOT_TRACK")
        variables = {k: v for k, v in os.environ.items() if k.startswith(prefixes)}
        if path is not None:
            variables["PYTHONPATH"] = path
        if 0 < self.num_gpus < 1:  # Ray puts several jobs on a GPU
            variables |= gpu_share_variables(1 / self.num_gpus)
        return {**variables, **{k: str(v) for k, v in self.env_vars.items()}}


def run_in_worker(
    number: int,
    overrides: list[str],
    hydra_context: HydraContext,
    config: DictConfig,
    task_function: TaskFunction,
    singleton_state: Any,
    folder: str,
    secret_variables: dict[str, str],
) -> JobReturn:
    """Run one job in a Ray worker, in the sweep's working folder, as Hydra's own launchers do."""
    os.environ.update(secret_variables)
    os.chdir(folder)
    setup_globals()
    Singleton.set_state(singleton_state)
    job = hydra_context.config_loader.load_sweep_config(config, overrides)
    with open_dict(job):
        job.hydra.job.id = f"{job.hydra.job.name}_{number}"
        job.hydra.job.num = number
    HydraConfig.instance().set_config(job)
    with _exit_for_retry():
        return run_job(
            hydra_context=hydra_context,
            task_function=task_function,
            config=job,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )


def _split_secrets(variables: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Split variables into those for Ray, and those with secrets.

    Ray writes the variables of a worker to its log files and to the worker's command line.
    """
    secret_names = {k for k, v in variables.items() if is_secret_name(k) or redact_urls(v) != v}
    return (
        {k: v for k, v in variables.items() if k not in secret_names},
        {k: v for k, v in variables.items() if k in secret_names},
    )


@contextmanager
def _exit_for_retry() -> Iterator[None]:
    """Let Ray retry a job that received a stop signal (a node is drained), from its checkpoint.

    Ray retries a job whose process ends without a result. An exception would end the job for good:
    Ray treats KeyboardInterrupt as the response to `ray.cancel`, which sends SIGINT.
    """
    with handle_stop_signals():
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            if not set(SCHEDULER_SIGNALS).intersection(received_signals):
                raise
            log.warning("received a stop signal: exiting, so that Ray retries this job.")
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(128 + signal.SIGTERM)


@contextmanager
def _keep_sigterm_handler() -> Iterator[None]:
    """Restore the SIGTERM handler after the block: Ray's own ends the process immediately."""
    previous_handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, previous_handler)


def _check_address(address: str) -> None:
    """Raise OSError if nothing listens at HOST:PORT: Ray itself would retry for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()


def _failure_text(error: BaseException) -> str:
    """Describe why Ray lost a job, without traceback and log paths."""
    cause = getattr(error, "cause", None)  # a RayTaskError has the exception of the worker
    text = str(error) if cause is None else f"{type(cause).__name__}: {cause}"
    return next(iter(text.splitlines()), type(error).__name__)
