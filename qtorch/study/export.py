"""A fitted model as a file for other programs: ONNX, a torch program, or weights and JSON."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qtorch
from qtorch.core.errors import ConfigError, DataError, ExportError, unknown_name
from qtorch.core.files import whole_file
from qtorch.data.batches import Batch
from qtorch.data.sample_set import Samples
from qtorch.data.samples import samples_of
from qtorch.model.factories import loss_of
from qtorch.model.feeding import readout_of
from qtorch.model.lightning_model import LightningModel
from qtorch.model.network_config import build_network, network_config
from qtorch.study.export_program import Scoring, first_line, traced
from qtorch.study.warm_start import WarmStart

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors"}
TOLERANCE = 1e-5
SMALL = 0.1  # a score below it counts as so large where differences are judged
CHECKED_DAYS = 3
KEY = "qtorch"  # of the description inside a file
NOT_INCLUDED = (
    "x holds the features as the dataset's infer processors give them; their fitted statistics "
    "are not in this file."
)
Run = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Exported:
    """A file that was checked: `difference` is the largest one between its scores and the
    model's, of `samples` samples; `allowed` is what it could have been."""

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
) -> Exported:
    """Write a fitted LightningModel to `path`, once the file has given the model's own scores.

    `format`: "onnx" (needs the extra `export`), "torch" (a program of torch.export, which torch
    alone runs; its format follows torch's versions) or "safetensors" (the weights, for
    `load_network`); by default what the suffix says. Both programs take batches of any size and
    give the score that `predict` gives. Beside the file, and inside it under "qtorch", JSON tells
    the inputs by name and shape, the features in their order, step_len, the network's
    configuration and the `run`. Not included are the statistics of the dataset's processors.

    The first days of `segment` are scored from the file that would be written, in batches of one
    and of several, on the CPU. Where a score differs by more than `tolerance` times the largest
    score (at least 0.1) it raises ExportError and leaves no file. Raises ConfigError for a model
    without a network of its own, or one that the format cannot hold.
    """
    path = Path(path).expanduser()
    form = format or _format_of(path)
    if form not in SUFFIXES:
        raise ConfigError(unknown_name("format", form, SUFFIXES))
    fitted = _fitted(model)
    scoring = Scoring(copy.deepcopy(fitted.network_).eval(), readout_of(loss_of(fitted.loss)))
    samples, expected = _checked_samples(fitted, dataset, segment)
    batches = [scoring.inputs_of(batch) for batch in _batches(samples, scoring.cross_section)]
    told = {KEY: qtorch.__version__, "format": form, "run": run, **_described(fitted, samples)}
    data, call, told = _written(form, scoring, batches[-1], told)
    found = torch.cat([_scored(call, inputs, scoring, form) for inputs in batches])
    difference, allowed = _difference(found, expected, tolerance, form)
    with whole_file(path) as temporary:
        temporary.write_bytes(data)
    description = path.with_name(path.name + ".json")
    done = Exported(path, description, form, len(data), len(expected), difference, allowed)
    check = {k: v for k, v in asdict(done).items() if k in ("samples", "difference", "allowed")}
    with whole_file(description) as temporary:
        temporary.write_text(json.dumps({**told, "check": check}, indent=1) + "\n")
    return done


def load_network(path: str | Path) -> nn.Module:
    """The network of an export in the format "safetensors", in evaluation mode.

    Its names pass the trust rule. Raises DataError for another file.
    """
    return _network_of(Path(path).expanduser().read_bytes(), str(path))


def _format_of(path: Path) -> str:
    for form, suffix in SUFFIXES.items():
        if path.suffix == suffix:
            return form
    raise ConfigError(
        f"{path.name}: expected a name that ends in {', '.join(SUFFIXES.values())}, or a format "
        f"({', '.join(SUFFIXES)})."
    )


def _fitted(model: Any) -> LightningModel:
    """The model whose network is exported, on the CPU, where the files are checked."""
    inner = model._fitted() if isinstance(model, WarmStart) else model
    if not isinstance(inner, LightningModel):
        raise ConfigError(
            f"a {type(inner).__name__} has no network to export; a LightningModel has one."
        )
    network = inner._fitted()
    if callable(getattr(network, "predict_step", None)):
        raise ConfigError(
            f"{type(network).__name__} predicts from a Batch by its own predict_step, which no "
            "file of tensors can hold; export the network in it with torch's own means."
        )
    found = copy.copy(inner)
    found.trainer = {**inner.trainer, "accelerator": "cpu", "devices": 1}
    return found


# -- what it is checked with -----------------------------------------------------------------


def _checked_samples(
    model: LightningModel, dataset: Any, segment: str | slice
) -> tuple[Samples, Tensor]:
    """The samples of a segment's first days, and the model's own scores of them."""
    whole = samples_of(dataset, segment, data_key="infer")
    if not len(whole):
        raise DataError(f"the segment {segment!r} holds no sample to check the export with.")
    days = whole.index.get_level_values("datetime").unique()[:CHECKED_DAYS]
    span = slice(days[0], days[-1])
    samples = samples_of(dataset, span, data_key="infer")
    if model.learnt_ is not None:
        samples = model.learnt_.matched(samples)
    return samples, torch.tensor(model.predict(dataset, span).to_numpy())


def _batches(samples: Samples, by_day: bool) -> list[Batch]:
    """One sample (or day), then all others: in the samples' order, in two sizes."""
    count = samples.num_days if by_day else len(samples)
    make = samples.day_batch if by_day else samples.batch
    parts = [torch.arange(1), torch.arange(1, count)]
    return [make(part) for part in parts if len(part)]


def _scored(call: Run, inputs: Sequence[Tensor], scoring: Scoring, form: str) -> Tensor:
    """The scores of a batch's samples, by the file."""
    size = " x ".join(str(n) for n in inputs[0].shape[: scoring.num_axes])
    try:
        with torch.inference_mode():
            found = call(inputs)
    except Exception as error:  # of the runtime's own kinds
        raise ExportError(
            f"the {form} file of this {type(scoring.network).__name__} cannot score a batch of "
            f"{size}: {first_line(error)} Nothing is written."
        ) from error
    return found[inputs[1]] if scoring.cross_section else found.flatten()


def _difference(
    found: Tensor, expected: Tensor, tolerance: float, form: str
) -> tuple[float, float]:
    largest = float(expected.abs().nan_to_num().max())
    allowed = tolerance * max(largest, SMALL)
    same = (found == expected) | (found.isnan() & expected.isnan())
    difference = float(torch.where(same, 0.0, (found - expected).abs()).max())
    if not difference <= allowed:  # NaN on one side alone is a difference
        raise ExportError(
            f"the {form} file's scores differ from the model's by up to {difference:.2g}, more "
            f"than the {allowed:.2g} allowed (tolerance {tolerance:g} x the largest score); "
            "nothing is written. Where so much is fine, raise tolerance."
        )
    return difference, allowed


# -- the formats -----------------------------------------------------------------------------


def _described(model: LightningModel, samples: Samples) -> dict[str, Any]:
    network = model.network_
    assert network is not None, "a fitted model has a network"
    flat = getattr(network, "inputs", "window") == "flat"
    told = {
        "features": list(samples.feature_names),
        "step_len": samples.num_steps,
        "layout": (
            "feature by feature, each with its steps from the oldest to the newest"
            if flat
            else "steps from the oldest to the newest, each with its features"
        ),
        "labels": list(samples.label_names),
        "note": NOT_INCLUDED,
    }
    if "instrument" in getattr(network, "extras", ()):
        told["instruments"] = [str(name) for name in samples.instruments]
    try:
        told["network"] = model.network_config_ or network_config(network)
    except ConfigError:  # a live network of the user's: a program holds it all the same
        told["network"] = None
    return told


def _written(
    form: str, scoring: Scoring, example: Sequence[Tensor], told: dict[str, Any]
) -> tuple[bytes, Run, dict[str, Any]]:
    """The file's bytes, what scores with these very bytes, and its description."""
    if form == "safetensors":
        data = _safetensors_bytes(scoring.network, told)
        again = Scoring(_network_of(data, "the export"), scoring.readout)
        return data, lambda inputs: again(*inputs), told
    if form == "onnx":  # says what is missing before the work, not after it
        from qtorch.study.onnx_file import onnx_bytes, onnx_runner
    program = traced(scoring, example)
    inputs = [
        {"name": name, "shape": shape, "dtype": str(t.dtype).removeprefix("torch.")}
        for name, shape, t in zip(scoring.names, program.shapes, example, strict=True)
    ]
    told = {**told, "inputs": inputs, "output": "score"}
    text = json.dumps(told)
    if form == "onnx":
        data = onnx_bytes(program.program, scoring.names, "score", {KEY: text})
        return data, onnx_runner(data, scoring.names), told
    buffer = io.BytesIO()
    torch.export.save(program.program, buffer, extra_files={f"{KEY}.json": text})
    loaded = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    return buffer.getvalue(), lambda inputs: loaded(*inputs), told


def _safetensors_bytes(network: nn.Module, told: dict[str, Any]) -> bytes:
    from safetensors.torch import save

    if told["network"] is None:
        raise ConfigError(
            f"{type(network).__name__} was given live, and no configuration builds it again; give "
            "it as {'_target_': ...}, or export a program: format=onnx or format=torch."
        )
    tensors = {k: v.detach().contiguous().clone() for k, v in network.state_dict().items()}
    data: bytes = save(tensors, metadata={KEY: json.dumps(told)})
    return data


def _network_of(data: bytes, name: str) -> nn.Module:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
        # The header is JSON behind its length: 8 bytes, little endian.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        told = json.loads(header["__metadata__"][KEY])
    except (SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{name} is no network that qtorch exported: {error}") from error
    network = build_network(told["network"], stored=True).eval()
    network.load_state_dict(tensors)
    return network
