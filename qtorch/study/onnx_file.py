"""ONNX files: from a program of torch.export, and back to scores with onnxruntime."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from qtorch.core.errors import ConfigError

try:
    import onnx
    import onnxruntime
    import onnxscript
except ModuleNotFoundError as missing:
    raise ConfigError(
        f"an export to ONNX needs {missing.name}: pip install 'qtorch[export]'."
    ) from missing

NEEDS = (onnx, onnxruntime, onnxscript)  # torch imports the last one itself


def onnx_bytes(
    program: ExportedProgram, names: Sequence[str], output: str, metadata: Mapping[str, str]
) -> bytes:
    """One ONNX file with all weights in it, inputs and output named, `metadata` in its props."""
    with _quietly():
        converted = torch.onnx.export(
            program,
            input_names=list(names),
            output_names=[output],
            external_data=False,
            verbose=False,
        )
    assert converted is not None, "dynamo=True gives a program"
    proto = converted.model_proto
    onnx.helper.set_model_props(proto, dict(metadata))
    data: bytes = proto.SerializeToString()
    return data


def onnx_runner(data: bytes, names: Sequence[str]) -> Callable[[Sequence[Tensor]], Tensor]:
    """Inputs in the order of `names` to the first output, by onnxruntime on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    known = {each.name for each in session.get_inputs()}

    def run(inputs: Sequence[Tensor]) -> Tensor:
        # An input that the network does not use is no input of the graph.
        given = {n: t.numpy() for n, t in zip(names, inputs, strict=True) if n in known}
        found: Any = session.run(None, given)[0]
        return torch.from_numpy(found)

    return run


@contextmanager
def _quietly() -> Iterator[None]:
    """The exporter tells its steps and its optimizer's rules on several loggers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
