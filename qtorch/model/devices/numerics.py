"""The settings of torch that decide about the last bits of a training's numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qtorch.core.errors import check_name
from qtorch.model.loop.options import TrainerOptions

MATMUL_PRECISIONS = ("highest", "high", "medium")
# cuBLAS adds in a fixed order only with a workspace of a fixed size.
CUBLAS_VARIABLE, CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"


def check_matmul_precision(precision: str | None) -> None:
    """Raise ConfigError, with the nearest name, for a precision that torch does not know."""
    if precision is not None:
        check_name("matmul_precision", precision, MATMUL_PRECISIONS)


@contextmanager
def numerical_settings(options: TrainerOptions, matmul_precision: str | None) -> Iterator[None]:
    """Context manager that applies the settings of a training, and restores torch's afterwards.

    `matmul_precision` is that of torch.set_float32_matmul_precision; cuDNN uses TensorFloat-32 if
    it is not "highest". None leaves both as they are. For `trainer.deterministic` it sets cuBLAS's
    workspace: the device must not have been used before. (Lightning sets the variable too, but
    only after the features are on the device.)
    """
    deterministic = options.arguments.get("deterministic")
    if deterministic:
        os.environ.setdefault(CUBLAS_VARIABLE, CUBLAS_WORKSPACE)
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    precision = torch.get_float32_matmul_precision()
    cudnn: Any = torch.backends.cudnn
    allow_tf32, benchmark = cudnn.allow_tf32, cudnn.benchmark
    if matmul_precision is not None:
        torch.set_float32_matmul_precision(matmul_precision)
        cudnn.allow_tf32 = matmul_precision != "highest"
    if deterministic is not None:
        torch.use_deterministic_algorithms(bool(deterministic), warn_only=deterministic == "warn")
    try:
        yield
    finally:
        if matmul_precision is not None:
            torch.set_float32_matmul_precision(precision)
            cudnn.allow_tf32 = allow_tf32
        torch.use_deterministic_algorithms(is_deterministic, warn_only=only_warns)
        cudnn.benchmark = benchmark


def describe_numerics(device: torch.device) -> dict[str, Any]:
    """Return the current settings for a report."""
    settings: dict[str, Any] = {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        settings["cudnn_tf32"] = bool(torch.backends.cudnn.allow_tf32)
    return settings
