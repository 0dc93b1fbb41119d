"""`hydra/launcher=ray`: the jobs of a sweep as tasks of a Ray cluster.

Hydra's own Ray launcher asks for versions of other packages that do not go with MLflow's; this
one does what a sweep needs: resources a job, a process a job, another try for a job whose worker
or node died.
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
from hydra.core.utils import (
    JobReturn,
    configure_log,
    run_job,
    setup_globals,
)
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from qtorch.cli.signals import interruptible
from qtorch.core.errors import ConfigError
from qtorch.core.stops import NOTICES, noted

log = logging.getLogger(__name__)

# What Ray is told before it is imported: no reports home, one line of a job once.
VARIABLES = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
# A cluster of this command's own stays on loopback, and its jobs are no background work.
OWN_CLUSTER = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_worker_niceness": "0"}
REACH_SECONDS = 5.0
STOP_SECONDS = 60.0


class RayLauncher(Launcher):
    """Runs each job in a Ray worker of its own; the cluster is a running one or made for the sweep.

    The arguments are those of conf/hydra/launcher/ray.yaml. The sweep's folder must be a path that
    all nodes see, for each job leaves its result there.
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
        self._ours = False  # whether this process connected
        self.stays_open = (
            False  # for a sweeper that launches again and again, and closes at the end
        )
        self.env_vars, self.init, self.remote = _plain(env_vars), _plain(init), _plain(remote)

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Hydra's."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run the jobs; one that could not be run is a failed JobReturn, not an error."""
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        from qtorch.cli.settled_jobs import settled_jobs  # with torch

        jobs = dict(enumerate(job_overrides, initial_job_idx))
        returns = settled_jobs(self.hydra_context, self.config, jobs)
        left = {n: overrides for n, overrides in jobs.items() if n not in returns}
        if left:
            ray = self._connected()
            try:
                returns.update(self._run(ray, left))
            finally:
                if not self.stays_open:
                    self.close()
        return [returns[n] for n in jobs]

    def close(self) -> None:
        """Leave the cluster, and end it where it was made for this command."""
        if self._ours:
            import ray

            self._ours = False
            ray.shutdown()

    def _connected(self) -> Any:
        """Ray, connected."""
        local = self.address in (None, "local")
        for name, value in {**VARIABLES, **(OWN_CLUSTER if local else {})}.items():
            os.environ.setdefault(name, value)
        try:
            import ray
        except ImportError as error:
            raise ConfigError("hydra/launcher=ray needs Ray: pip install 'qtorch[ray]'.") from error
        if ray.is_initialized():
            return ray
        options: dict[str, Any] = {"log_to_driver": True, "logging_level": "warning"}
        if local:
            options |= {"address": "local", "include_dashboard": False}
        else:
            options["address"] = self.address
        try:
            _check_reached(str(self.address))
            with _own_signals():
                ray.init(**{**options, **self.init})
        except (ConnectionError, OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"no Ray cluster at hydra.launcher.address={self.address}: {error}. Start one with "
                "`ray start --head`, or leave the address out for one of this command's own."
            ) from error
        self._ours = True
        return ray

    def _run(self, ray: Any, jobs: Mapping[int, Sequence[str]]) -> dict[int, JobReturn]:
        options = {
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus,
            "max_retries": self.max_retries,
            "max_calls": 1,  # a process a job: nothing of one reaches the next
            "runtime_env": {"env_vars": self._environment()},
            **({} if self.memory is None else {"memory": self.memory}),
            **self.remote,
        }
        task = ray.remote(**options)(run_in_worker)
        state = ray.put(Singleton.get_state())
        sent = {}
        for number, overrides in jobs.items():
            log.info("\t#%d : %s", number, " ".join(o for o in overrides if "hydra." not in o))
            sent[number] = task.remote(
                number,
                list(overrides),
                self.hydra_context,
                self.config,
                self.task_function,
                state,
                os.getcwd(),
            )
        try:
            return {n: self._result(ray, each, n, jobs[n]) for n, each in sent.items()}
        except BaseException as stop:
            for each in sent.values():
                ray.cancel(each, force=False)
            if not isinstance(stop, Exception):  # Ctrl-C: they keep a checkpoint
                ray.wait(list(sent.values()), num_returns=len(sent), timeout=STOP_SECONDS)
            raise

    def _result(self, ray: Any, sent: Any, number: int, overrides: Sequence[str]) -> JobReturn:
        try:
            found: JobReturn = ray.get(sent)
            return found
        except ray.exceptions.RayError as error:
            from qtorch.cli.lost import note_lost_job
            from qtorch.cli.settled_jobs import composed_job

            job = composed_job(self.hydra_context, self.config, number, overrides)
            why = f"Ray lost it (max_retries={self.max_retries}): {_first_line(error)}"
            return note_lost_job(job, number, overrides, why)

    def _environment(self) -> dict[str, str]:
        """What a worker needs to find this code and the same stores."""
        paths = [p for p in sys.path if p and Path(p).is_dir()]
        own = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(dict.fromkeys([own, *paths])) if own in paths else None
        kept = ("QTORCH_", "MLFLOW_", "OMP_", "HYDRA_", "AWS_", "DO_NOT_TRACK")
        found = {k: v for k, v in os.environ.items() if k.startswith(kept)}
        if path is not None:
            found["PYTHONPATH"] = path
        return {**found, **{k: str(v) for k, v in self.env_vars.items()}}


def run_in_worker(
    number: int,
    overrides: list[str],
    hydra_context: HydraContext,
    config: DictConfig,
    task_function: TaskFunction,
    singleton_state: Any,
    folder: str,
) -> JobReturn:
    """One job, in a Ray worker: in the sweep's working folder, as Hydra's own launchers run it."""
    os.chdir(folder)
    setup_globals()
    Singleton.set_state(singleton_state)
    job = hydra_context.config_loader.load_sweep_config(config, overrides)
    with open_dict(job):
        job.hydra.job.id = f"{job.hydra.job.name}_{number}"
        job.hydra.job.num = number
    HydraConfig.instance().set_config(job)
    with _tried_again():
        return run_job(
            hydra_context=hydra_context,
            task_function=task_function,
            config=job,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )


@contextmanager
def _tried_again() -> Iterator[None]:
    """After a notice (a node is drained) Ray is to try the job again, from its checkpoint.

    It does so where a process ends without a result. An exception would be the job's end: Ray
    takes KeyboardInterrupt for the answer to `ray.cancel`, whose signal is SIGINT.
    """
    with interruptible():
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            if not {noted.asked, noted.answered} & set(NOTICES):
                raise
            log.warning("asked to stop: this job is left to another try.")
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(128 + signal.SIGTERM)


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray puts a handler of its own for SIGTERM, which ends the process on the spot."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _check_reached(address: str) -> None:
    """OSError where nobody listens at HOST:PORT: Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=REACH_SECONDS).close()


def _first_line(error: BaseException) -> str:
    """What Ray says of a job that it lost: without a traceback, and without where its logs are."""
    cause = getattr(error, "cause", None)  # of a RayTaskError: what was raised in the worker
    told = str(error) if cause is None else f"{type(cause).__name__}: {cause}"
    return next(iter(told.splitlines()), type(error).__name__)


def _plain(value: Any) -> dict[str, Any]:
    found: Any = value
    if OmegaConf.is_config(value):
        found = OmegaConf.to_container(value, resolve=True)
    return dict(found or {})
