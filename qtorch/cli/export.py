"""`qtorch export`: export and verify the network of a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qtorch.cli.compose import compose_settings
from qtorch.cli.guard import configure_process, handle_stop_signals
from qtorch.cli.options import output_path
from qtorch.cli.runs import load_finished_run, load_model_and_dataset, parse_segment
from qtorch.core.errors import ConfigError, check_name

USAGE = """\
qtorch export: export the network of a finished run for use in other programs

usage: qtorch export run=RUN_ID format=onnx|torch|safetensors [out=FILE] [log=true]
                     [segment=...] [tolerance=...] [data=...]
                     [allow_nonfinite=true]

  run        the run ID, its first digits, a name, or latest
  format     onnx         for onnxruntime and others; needs the packages of the extra `export`
             torch        .pt2, a program for torch.export.load; needs nothing but torch
             safetensors  weights and the network's configuration, for qtorch.study.load_network
  out        output file; default: RUN_ID.onnx, .pt2 or .safetensors in this folder
  log        true: also log the file as an artifact of the run, under export/
  segment    data for the check: a segment of the run's dataset, or two dates
  tolerance  largest allowed score difference, relative to the largest score (1e-5)
  data       use another data source: data=qlib data.provider_uri=...
  allow_nonfinite  true: export a model with NaN or infinite weights or scores too

onnx and torch files accept batches of any size and return the scores of `qtorch predict`. x has
the shape [batch, step_len, features] (flat networks: [batch, features * step_len]); networks that
score whole days take x [days, instruments, ...] and a mask. FILE.json, and the entry "qtorch"
inside the file, describe every input, the order of the features, and step_len.

Before the file is written, its scores for some days are compared with the model's; a difference is
an error, and no file is written. Not included: the statistics of the dataset's processors. x is
the dataset's output after its infer processors.
"""


def main(argv: Sequence[str]) -> int:
    """Load the run's model and dataset, export the network and verify the file."""
    settings = compose_settings("export", argv)
    configure_process(tracking_uri=settings["tracking"].get("uri"))
    path = _export_path(settings)
    # Imported here, so that --help need not load torch.
    from qtorch.study.export import export_model

    with handle_stop_signals():
        recorder = load_finished_run(settings["run"])
        model, dataset = load_model_and_dataset(
            recorder, settings.get("data"), allow_nonfinite=settings["allow_nonfinite"]
        )
        result = export_model(
            model,
            dataset,
            path,
            format=settings["format"],
            segment=parse_segment(settings["segment"], dataset),
            tolerance=settings["tolerance"],
            run=recorder.id,
        )
        if settings["log"]:
            for file in (result.path, result.description):
                recorder.log_artifact(file, "export")
    print(
        f"{result.path} ({result.num_bytes:,} bytes): {result.samples:,} scores equal the "
        f"model's to {result.difference:.1g} ({result.allowed:.1g} allowed)\n"
        f"{result.description} describes the inputs"
    )
    if settings["log"]:
        print(f"logged both files as artifacts of run {recorder.id}, under export/")
    return 0


def _export_path(settings: dict[str, Any]) -> Path:
    """Check and return the path of the file, before any work is done."""
    from qtorch.study.export import SUFFIXES

    out, format_name = settings["out"], settings["format"]
    check_name("format", format_name, SUFFIXES)
    # An ID without letters is a number for Hydra.
    path = output_path(out or f"{settings['run']}{SUFFIXES[format_name]}")
    if path.is_dir():
        raise ConfigError(f"out={out} is a folder; give the name of a file.")
    return path
