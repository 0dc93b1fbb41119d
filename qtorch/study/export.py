"""Export a fitted model to a file for other programs: ONNX, a torch program, or safetensors."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import qtorch
from qtorch.core.errors import ConfigError, DataError, ExportError, unknown_name_message
from qtorch.core.file_digest import PLACEHOLDER, check_digest, insert_digest
from qtorch.core.files import atomic_write
from qtorch.core.session import resolve_path
from qtorch.core.trust import as_stored_text
from qtorch.data.dataset.batch import Batch
from qtorch.data.dataset.qlib_dataset import get_samples
from qtorch.data.dataset.samples import Samples
from qtorch.model.lightning_model import LightningModel
from qtorch.model.loop.factories import build_loss
from qtorch.model.loop.scoring import ForwardAdapter, get_readout
from qtorch.model.network_config import build_network, network_config
from qtorch.study.warm_start import WarmStart

BATCH_AXES = {1: ("batch",), 2: ("days", "instruments")}
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors"}
TOLERANCE = 1e-5
MIN_SCALE = 0.1  # the tolerance is relative to the largest score, but at least to this value
NUM_CHECK_DAYS = 3
METADATA_KEY = "qtorch"  # of the metadata inside a file
DIGEST_KEY = "digest"  # of a safetensors file's metadata; files of older versions have none
PROCESSOR_NOTE = (
    "x holds the features after the dataset's infer processors; the fitted statistics of the "
    "processors are not in this file."
)
ScoreFunction = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class ExportResult:
    """An exported file whose scores were checked against the model's.

    `description` is the path of the JSON file beside it. `difference` is the largest difference
    over `samples` samples, and `allowed` the limit that it had to keep.
    """

    path: Path
    description: Path
    format: str
    num_bytes: int
    samples: int
    difference: float
    allowed: float


def export_model(
    model: Any,
    dataset: Any,
    path: str | Path,
    *,
    format: str | None = None,
    segment: str | slice = "test",
    tolerance: float = TOLERANCE,
    run: str | None = None,
) -> ExportResult:
    """Export a fitted LightningModel to `path` after checking that the file gives the same scores.

    `format`: "onnx" (needs the extra `export`), "torch" (a program of torch.export, which only
    needs torch to run; its format depends on torch's version) or "safetensors" (the weights, for
    `load_network`); by default the format follows from the suffix. Both programs accept batches of
    any size and return the scores of `predict`. JSON metadata beside the file, and inside it under
    "qtorch", lists the names and shapes of the inputs, the features in order, step_len, the
    network's configuration and the ID of the `run`; beside the file also its SHA-256. The fitted
    statistics of the dataset's processors are not included.

    The check scores the first days of `segment` with the exact bytes to be written, in batches of
    one and of several, on the CPU. If a score differs by more than `tolerance` times the largest
    score (at least 0.1), it raises ExportError and leaves no file. Raises ConfigError for a model
    without a network, or whose network the format cannot represent.
    """
    path = resolve_path(path)
    file_format = format or _guess_format(path)
    if file_format not in SUFFIXES:
        raise ConfigError(unknown_name_message("format", file_format, SUFFIXES))
    cpu_model = _copy_to_cpu(model)
    network = copy.deepcopy(cpu_model._require_network()).eval()
    scoring = ScoringModule(network, get_readout(build_loss(cpu_model.loss)))
    samples, model_scores = _check_samples(cpu_model, dataset, segment)
    batches = [
        scoring.batch_inputs(batch) for batch in _check_batches(samples, scoring.cross_section)
    ]
    metadata = {
        METADATA_KEY: qtorch.__version__,
        "format": file_format,
        "run": run,
        **_describe_model(cpu_model, samples),
    }
    data, score, metadata = _serialize_model(file_format, scoring, batches[-1], metadata)
    scores = torch.cat([_score_batch(score, inputs, scoring, file_format) for inputs in batches])
    difference, allowed = _check_difference(scores, model_scores, tolerance, file_format)
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)
    description = path.with_name(path.name + ".json")
    result = ExportResult(
        path, description, file_format, len(data), len(model_scores), difference, allowed
    )
    check = {k: v for k, v in asdict(result).items() if k in ("samples", "difference", "allowed")}
    content = {**metadata, "sha256": hashlib.sha256(data).hexdigest(), "check": check}
    with atomic_write(description) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    return result


def load_network(path: str | Path) -> nn.Module:
    """Load the network of a "safetensors" export, in evaluation mode.

    The class names in the file must be trusted. Raises DataError for a damaged file and any other
    one.
    """
    return _load_network_bytes(resolve_path(path).read_bytes(), str(path))


def _guess_format(path: Path) -> str:
    for file_format, suffix in SUFFIXES.items():
        if path.suffix == suffix:
            return file_format
    raise ConfigError(
        f"{path.name}: expected a name that ends in {', '.join(SUFFIXES.values())}, or an explicit "
        f"format ({', '.join(SUFFIXES)})."
    )


def _copy_to_cpu(model: Any) -> LightningModel:
    """A copy of the model that predicts on the CPU, where the exported files are checked."""
    inner = model._require_model() if isinstance(model, WarmStart) else model
    if not isinstance(inner, LightningModel):
        raise ConfigError(
            f"cannot export a {type(inner).__name__}: only a LightningModel has a network to "
            "export."
        )
    network = inner._require_network()
    if callable(getattr(network, "predict_step", None)):
        raise ConfigError(
            f"{type(network).__name__} predicts from a Batch in its own predict_step, which cannot "
            "be exported as a program of tensors; export the network inside it with torch itself."
        )
    cpu_model = copy.copy(inner)
    cpu_model.trainer = {**inner.trainer, "accelerator": "cpu", "devices": 1}
    return cpu_model


# -- the check ---------------------------------------------------------------------------------


def _check_samples(
    model: LightningModel, dataset: Any, segment: str | slice
) -> tuple[Samples, Tensor]:
    """The samples of a segment's first days, and the model's own scores for them."""
    segment_samples = get_samples(dataset, segment, data_key="infer")
    if not len(segment_samples):
        raise DataError(f"the segment {segment!r} has no sample to check the export with.")
    days = segment_samples.index.get_level_values("datetime").unique()[:NUM_CHECK_DAYS]
    span = slice(days[0], days[-1])
    samples = get_samples(dataset, span, data_key="infer")
    if model.input_schema_ is not None:
        samples = model.input_schema_.match_features(samples)
    return samples, torch.tensor(model.predict(dataset, span).to_numpy())


def _check_batches(samples: Samples, by_day: bool) -> list[Batch]:
    """One batch of the first sample (or day), and one of all others: two different sizes."""
    count = samples.num_days if by_day else len(samples)
    make_batch = samples.day_batch if by_day else samples.batch
    parts = [torch.arange(1), torch.arange(1, count)]
    return [make_batch(part) for part in parts if len(part)]


def _score_batch(
    score: ScoreFunction, inputs: Sequence[Tensor], scoring: ScoringModule, file_format: str
) -> Tensor:
    """The scores of a batch's samples, computed by the exported file."""
    size = " x ".join(str(n) for n in inputs[0].shape[: scoring.num_axes])
    try:
        with torch.inference_mode():
            scores = score(inputs)
    except Exception as error:  # each runtime has exception types of its own
        raise ExportError(
            f"the {file_format} file of {type(scoring.network).__name__} cannot score a batch of "
            f"{size}: {first_line(error)} No file was written."
        ) from error
    return scores[inputs[1]] if scoring.cross_section else scores.flatten()


def _check_difference(
    scores: Tensor, model_scores: Tensor, tolerance: float, file_format: str
) -> tuple[float, float]:
    largest = float(model_scores.abs().nan_to_num().max())
    allowed = tolerance * max(largest, MIN_SCALE)
    is_equal = (scores == model_scores) | (scores.isnan() & model_scores.isnan())
    difference = float(torch.where(is_equal, 0.0, (scores - model_scores).abs()).max())
    if not difference <= allowed:  # `not <=` also catches a NaN on one side only
        raise ExportError(
            f"the {file_format} file's scores differ from the model's by up to {difference:.2g}, "
            f"more than the allowed {allowed:.2g} (tolerance {tolerance:g} x the largest score). "
            "No file was written. If this difference is acceptable, raise tolerance."
        )
    return difference, allowed


# -- the formats -----------------------------------------------------------------------------


def _describe_model(model: LightningModel, samples: Samples) -> dict[str, Any]:
    network = model.network_
    assert network is not None, "a fitted model has a network"
    is_flat = getattr(network, "inputs", "window") == "flat"
    metadata = {
        "features": list(samples.feature_names),
        "step_len": samples.num_steps,
        "layout": (
            "feature by feature, each with its steps from the oldest to the newest"
            if is_flat
            else "steps from the oldest to the newest, each with its features"
        ),
        "labels": list(samples.label_names),
        "note": PROCESSOR_NOTE,
    }
    if "instrument" in getattr(network, "extras", ()):
        metadata["instruments"] = [str(name) for name in samples.instruments]
    try:
        metadata["network"] = model.network_config_ or network_config(network)
    except ConfigError:  # the user passed a network object, which a program can still represent
        metadata["network"] = None
    return metadata


def _serialize_model(
    file_format: str, scoring: ScoringModule, example: Sequence[Tensor], metadata: dict[str, Any]
) -> tuple[bytes, ScoreFunction, dict[str, Any]]:
    """The bytes of the file, a function that scores with these very bytes, and the metadata."""
    if file_format == "safetensors":
        data = _safetensors_bytes(scoring.network, metadata)
        rebuilt = ScoringModule(_load_network_bytes(data, "the export"), scoring.readout)
        return data, lambda inputs: rebuilt(*inputs), metadata
    if file_format == "onnx":  # imported first, so that a missing package is reported at once
        from qtorch.study.onnx_file import onnx_bytes, onnx_runner
    program, shapes = trace_program(scoring, example)
    inputs = [
        {"name": name, "shape": shape, "dtype": str(t.dtype).removeprefix("torch.")}
        for name, shape, t in zip(scoring.names, shapes, example, strict=True)
    ]
    metadata = {**metadata, "inputs": inputs, "output": "score"}
    text = json.dumps(metadata)
    if file_format == "onnx":
        data = onnx_bytes(program, scoring.names, "score", {METADATA_KEY: text})
        return data, onnx_runner(data, scoring.names), metadata
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={f"{METADATA_KEY}.json": text})
    module = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    return buffer.getvalue(), lambda inputs: module(*inputs), metadata


def _safetensors_bytes(network: nn.Module, metadata: dict[str, Any]) -> bytes:
    from safetensors.torch import save

    if metadata["network"] is None:
        raise ConfigError(
            f"{type(network).__name__} was passed as an object, so there is no configuration to "
            "rebuild it from. Pass it as {'_target_': ...}, or export a program: format=onnx or "
            "format=torch."
        )
    tensors = {k: v.detach().contiguous().clone() for k, v in network.state_dict().items()}
    text = json.dumps({DIGEST_KEY: PLACEHOLDER, **metadata})
    file = io.BytesIO(save(tensors, metadata={METADATA_KEY: text}))
    insert_digest(file)
    return file.getvalue()


def _load_network_bytes(data: bytes, name: str) -> nn.Module:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        is_intact = check_digest(data)
    except DataError as error:
        raise DataError(f"{name} is damaged: {error}") from error
    try:
        tensors = load(data)
        # The file starts with the length of its JSON header: 8 bytes, little endian.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = json.loads(header["__metadata__"][METADATA_KEY])
    except (SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{name} is not a network exported by qtorch: {error}") from error
    if DIGEST_KEY in metadata and not is_intact:
        raise DataError(f"{name} is damaged: its digest is missing.")
    network = build_network(as_stored_text(metadata["network"])).eval()
    network.load_state_dict(tensors)
    return network


# -- the program -------------------------------------------------------------------------------


class ScoringModule(nn.Module):
    """Maps positional input tensors to the scores of `predict`.

    The inputs are `x`, then `mask` if the network processes whole days, then the network's extras.
    The scores have shape `[B]`, or `[G, N]` (days, instruments) for whole days.
    """

    def __init__(self, network: nn.Module, readout: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.readout = network, readout
        self.cross_section = bool(getattr(network, "cross_section", False))
        self.extras: tuple[str, ...] = tuple(getattr(network, "extras", ()))

    @property
    def names(self) -> list[str]:
        """The names of the inputs, in order."""
        return ["x", *(["mask"] if self.cross_section else []), *self.extras]

    @property
    def num_axes(self) -> int:
        """The number of leading axes over samples: 1 (batch) or 2 (days, instruments)."""
        return 2 if self.cross_section else 1

    def forward(self, *inputs: Tensor) -> Tensor:
        positional, extra_tensors = inputs[: self.num_axes], inputs[self.num_axes :]
        score: Tensor = self.network(
            *positional, **dict(zip(self.extras, extra_tensors, strict=True))
        )
        return self.readout(score) if score.dim() > self.num_axes else score

    def batch_inputs(self, batch: Batch) -> list[Tensor]:
        """The input tensors of a batch, in order."""
        positional, extra_tensors = ForwardAdapter(self.network).arguments(batch)
        return [
            t.contiguous() for t in (*positional, *(extra_tensors[name] for name in self.extras))
        ]


def trace_program(
    scoring: ScoringModule, example: Sequence[Tensor]
) -> tuple[ExportedProgram, list[list[str | int]]]:
    """Trace a network in evaluation mode into a program for batches of any size.

    Also return the shapes of its inputs: the name of each dynamic axis, else its size. The number
    of instruments per day is dynamic too if the network allows it. Raises ConfigError if the
    network cannot be traced, or only for one batch size.
    """
    # torch.export treats axes of length one as constants, so every axis gets at least two entries.
    doubled_example = tuple(torch.cat([t, t]) for t in example)
    if scoring.num_axes == 2 and doubled_example[0].shape[1] == 1:
        doubled_example = tuple(torch.cat([t, t], 1) for t in doubled_example)
    dynamic_axes = dict.fromkeys(range(scoring.num_axes), Dim.AUTO)
    name = type(scoring.network).__name__
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                scoring, doubled_example, dynamic_shapes=((dynamic_axes,) * len(doubled_example),)
            )
    except Exception as error:  # torch.export raises dozens of exception types
        raise ConfigError(
            f"torch.export cannot trace {name}: {first_line(error)} "
            "format=safetensors works for any network built from a configuration."
        ) from error
    user_inputs = program.graph_signature.user_inputs
    shapes = [
        _symbolic_shape(node, scoring.num_axes)
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in user_inputs
    ]
    if isinstance(shapes[0][0], int):
        raise ConfigError(
            f"{name} could only be traced for batches of size {shapes[0][0]}; "
            "format=safetensors works for any network built from a configuration."
        )
    return program, shapes


def _symbolic_shape(node: Any, num_axes: int) -> list[str | int]:
    names = BATCH_AXES[num_axes]
    return [
        size if isinstance(size, int) else names[min(axis, num_axes - 1)]
        for axis, size in enumerate(node.meta["val"].shape)
    ]


def first_line(error: BaseException) -> str:
    """The first line of an error's message, ending with a period."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if text.endswith(".") else f"{text}."
