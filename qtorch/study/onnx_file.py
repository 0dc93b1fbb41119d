"""Write ONNX files from programs of torch.export, and run them with onnxruntime."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from qtorch.core.errors import ConfigError, install_command

try:
    import onnx
    import onnxruntime
    import onnxscript
except ModuleNotFoundError as missing:
    raise ConfigError(
        f"exporting to ONNX needs {missing.name}: {install_command('export')}."
    ) from missing

REQUIRED_MODULES = (onnx, onnxruntime, onnxscript)  # onnxscript is used by torch's exporter


def onnx_bytes(
    program: ExportedProgram, names: Sequence[str], output: str, metadata: Mapping[str, str]
) -> bytes:
    """Serialize a program to one ONNX file that includes the weights and `metadata`."""
    with _silence_loggers():
        onnx_program = torch.onnx.export(
            program,
            input_names=list(names),
            output_names=[output],
            external_data=False,
            verbose=False,
        )
    assert onnx_program is not None, "dynamo=True returns a program"
    proto = onnx_program.model_proto
    onnx.helper.set_model_props(proto, dict(metadata))
    data: bytes = proto.SerializeToString()
    return data


def onnx_runner(data: bytes, names: Sequence[str]) -> Callable[[Sequence[Tensor]], Tensor]:
    """A function that runs an ONNX file on the CPU: inputs in the order of `names` to scores."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    input_names = {graph_input.name for graph_input in session.get_inputs()}

    def run(inputs: Sequence[Tensor]) -> Tensor:
        # The graph does not have inputs that the network never uses.
        feeds = {n: t.numpy() for n, t in zip(names, inputs, strict=True) if n in input_names}
        scores: Any = session.run(None, feeds)[0]
        return torch.from_numpy(scores)

    return run


@contextmanager
def _silence_loggers() -> Iterator[None]:
    """Silence the loggers on which the exporter reports its steps and optimizer rules."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
