"""Make a running recorder MLflow's active run, for `mlflow.log_metric`, `log_figure`, autolog, ...

`mlflow.start_run` would read and change a run in the store that this process has just created or
read, and replace its status. So the run is put directly on the stack of active runs that MLflow
keeps for each thread; this is the only module that touches that stack and MLflow's tracking URI.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlflow
from mlflow.entities import LifecycleStage, Run, RunData, RunInfo
from mlflow.environment_variables import MLFLOW_TRACKING_URI
from mlflow.tracking import fluent
from mlflow.tracking._tracking_service import utils as tracking_service

from qtorch.tracking.store_types import RunRow


@dataclass(eq=False)
class _Activation:
    """An active run's tracking URI and experiment, and those to return to after it."""

    uri: str
    earlier_uri: Any
    experiment_id: str
    earlier_experiment_id: str | None


_activations: list[_Activation] = []


def activate_run(uri: str, row: RunRow) -> Callable[[], None]:
    """Make a run MLflow's active run in this thread; return the function that undoes it.

    MLflow's tracking URI and experiment become those of the run, for the whole process, until then,
    so that `mlflow.start_run(nested=True)` adds a run to the same experiment. An active run of the
    user's own stays below it on the stack. The environment does not change, so that no
    child process inherits a URI with a password.
    """
    service: Any = tracking_service  # its type says that the URI is None
    # Runs that are active at once (the members of a fleet) may end in any order.
    module: Any = fluent  # its type says that the experiment is None
    activation = _Activation(
        uri, service._tracking_uri, row.experiment_id, module._active_experiment_id
    )
    _activations.append(activation)
    _set_tracking_uri(uri)
    module._active_experiment_id = row.experiment_id
    info = RunInfo(
        row.id,
        row.experiment_id,
        user_id="",
        status=row.status,
        start_time=row.start_time or 0,
        end_time=None,
        lifecycle_stage=LifecycleStage.ACTIVE,
        artifact_uri=row.artifact_uri,
        run_name=row.name,
    )
    active_run_class: Any = fluent.ActiveRun
    active_run = active_run_class(Run(info, RunData()))
    _stack().append(active_run)

    def deactivate() -> None:
        # The run may end in another thread than the one in which it started.
        for stack in (_stack(), *fluent._active_run_stack.get_all_thread_values().values()):
            stack[:] = [r for r in stack if r is not active_run]
        place = _activations.index(activation)
        later = _activations[place + 1 :]
        del _activations[place]
        if later:
            later[0].earlier_uri = activation.earlier_uri
            later[0].earlier_experiment_id = activation.earlier_experiment_id
            return
        # Otherwise the user has set another one meanwhile.
        if service._tracking_uri == uri:
            _set_tracking_uri(activation.earlier_uri)
        if module._active_experiment_id == activation.experiment_id:
            module._active_experiment_id = activation.earlier_experiment_id

    return deactivate


def _stack() -> list[Any]:
    variable: Any = fluent._active_run_stack
    stack: list[Any] = variable.get()
    return stack


def _set_tracking_uri(uri: str | None) -> None:
    variable = MLFLOW_TRACKING_URI.name
    value = os.environ.get(variable)
    mlflow.set_tracking_uri(uri)  # type: ignore[arg-type]  # None restores MLflow's default
    if value is None:
        os.environ.pop(variable, None)
    else:
        os.environ[variable] = value
