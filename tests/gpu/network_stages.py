"""Train and score with every network of conf/model on the pretended device.

    python network_stages.py FILE [NAME ...]

writes a JSON object to FILE: for each network its waits and kernels in each stage and the number
of tensors that are left on the device, or its error.
It prints the rows of the table in docs/gpu.md.
"""

from __future__ import annotations

import functools
import gc
import json
import math
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from pretended_cuda import CudaTensor, PretendedCuda  # noqa: E402  # before torch

# isort: split
import torch  # noqa: E402
from small_networks import (  # noqa: E402
    network_config,
    network_dataset,
    network_names,
    training_modules,
)

from qtorch.core.instantiate import init_instance_by_config  # noqa: E402
from qtorch.model import lightning_model  # noqa: E402
from qtorch.model.loop import scoring  # noqa: E402
from qtorch.model.loop.checkpoint import CheckpointCallback  # noqa: E402
from qtorch.model.loop.loader import StepBatches  # noqa: E402
from qtorch.model.loop.module import ScoreModule  # noqa: E402

STEP_STAGES = ("train", "valid", "predict")  # of one batch
FIRST_EPOCH = " in the first epoch"


def count_stages(gpu: PretendedCuda) -> None:
    """Count what the hooks of the training module do, each as a stage."""

    def count(owner: type, hook: str, stage: str, *, is_step: bool = False) -> None:
        method = owner.__dict__[hook]

        @functools.wraps(method)
        def counting_hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            name = stage
            # After a pretraining, the first epoch of the training sets up the optimizer again.
            if is_step and self.trainer.current_epoch <= self.pretraining_epochs:
                name += FIRST_EPOCH
            if gpu.stage == name:  # called by the hook of a derived class
                return method(self, *args, **kwargs)
            with gpu.counting(name) as counts:
                if not is_step or not isinstance(args[0], StepBatches):
                    return method(self, *args, **kwargs)
                loader = args[0]._loader
                before = loader.position
                result = method(self, *args, **kwargs)
                counts.calls += loader.position - before - 1
                return result

        setattr(owner, hook, counting_hook)

    for module_class in training_modules():
        if "validation_step" in module_class.__dict__:
            count(module_class, "validation_step", "valid", is_step=True)
        for hook in (
            "on_train_epoch_start",
            "on_train_epoch_end",
            "on_validation_epoch_start",
            "on_validation_epoch_end",
        ):
            if hook in module_class.__dict__:
                count(module_class, hook, hook.removeprefix("on_").replace("_", " "))
    count(ScoreModule, "training_step", "train", is_step=True)
    count(CheckpointCallback, "on_validation_start", "validation start")
    count(CheckpointCallback, "on_train_epoch_end", "checkpoint at the epoch's end")


def count_scoring(gpu: PretendedCuda) -> None:
    """Count the batches of a prediction, all but the first one, as a stage."""
    original = scoring.score_series

    class CountingLoader(scoring.BatchLoader):
        def __iter__(self) -> Any:
            for number, batch in enumerate(super().__iter__()):
                if number:  # the first batch lays out what the others share
                    gpu.stage = "predict"
                    gpu.stages["predict"].calls += 1
                yield batch
            gpu.stage = "around predict"

    def score_series(*args: Any, **kwargs: Any) -> Any:
        scoring_loader, scoring.BatchLoader = scoring.BatchLoader, CountingLoader  # type: ignore[misc]
        try:
            with gpu.counting("around predict"):
                return original(*args, **kwargs)
        finally:
            scoring.BatchLoader = scoring_loader  # type: ignore[misc]

    scoring.score_series = score_series
    lightning_model.score_series = score_series


def train_and_score(name: str, gpu: PretendedCuda) -> None:
    dataset = network_dataset(name)
    model = init_instance_by_config(network_config(name))
    gpu.stages.clear()
    model.fit(dataset)
    assert model.fit_report_["device"].startswith("cuda"), model.fit_report_["device"]
    scores = model.predict(dataset)
    assert scores.notna().all()


def stage_report(gpu: PretendedCuda) -> dict[str, Any]:
    return {
        name: {
            "calls": counts.calls,
            "kernels": counts.num_kernels,
            "operations": dict(counts.kernels),
            "waits": dict(counts.waits),
            "copies": dict(counts.copies),
        }
        for name, counts in gpu.stages.items()
    }


def num_device_tensors() -> int:
    """Count the tensors on the device that are alive, without a run of the garbage collector."""
    return sum(type(value) is CudaTensor for value in gc.get_objects())


def main(path: str, *names: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    report: dict[str, Any] = {}
    gc.freeze()  # so that a search for tensors does not look through all modules
    with PretendedCuda() as gpu:
        count_stages(gpu)
        count_scoring(gpu)
        for name in names or network_names():
            gc.collect()
            gc.disable()
            try:
                train_and_score(name, gpu)
                report[name] = {"stages": stage_report(gpu), "tensors": num_device_tensors()}
            except Exception:
                report[name] = {"error": traceback.format_exc()}
            print(table_row(name, report[name]), flush=True)
    Path(path).write_text(json.dumps(report, indent=1))


def table_row(name: str, result: dict[str, Any]) -> str:
    """Return a network's row of the table in docs/gpu.md."""
    if "error" in result:
        return f"| {name} | {result['error'].strip().splitlines()[-1]} |"
    stages = result["stages"]
    numbers = [num_step_waits(stages), *(num_launches(stages, stage) for stage in STEP_STAGES)]
    return f"| {' | '.join([name, *map(str, numbers)])} |"


def num_step_waits(stages: dict[str, Any]) -> int:
    """Return how often the host waited for the device in all steps."""
    names = (name for stage in STEP_STAGES for name in (stage, stage + FIRST_EPOCH))
    return sum(sum(stages[name]["waits"].values()) for name in names if name in stages)


def num_launches(stages: dict[str, Any], stage: str) -> int:
    """Return the number of kernels of a step after the first epoch, in which memory is set up."""
    return math.ceil(stages[stage]["kernels"] / stages[stage]["calls"])


if __name__ == "__main__":
    main(*sys.argv[1:])
