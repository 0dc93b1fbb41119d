"""`qtorch export`: a finished run's network as a file for other programs, checked first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qtorch.cli.compose import composed
from qtorch.cli.finished import finished_run, model_and_dataset, segment_of
from qtorch.cli.signals import interruptible
from qtorch.core.errors import ConfigError, unknown_name
from qtorch.core.runtime import configure_logging
from qtorch.core.session import init

USAGE = """\
qtorch export: a finished run's network as a file for other programs

usage: qtorch export run=RUN_ID format=onnx|torch|safetensors [out=FILE] [log=true]

  run        the run's id
  format     onnx         for onnxruntime and others; needs pip install 'qtorch[export]'
             torch        .pt2, a program that torch.export.load reads; torch alone runs it
             safetensors  the weights, and how the network is built: qtorch.study.load_network
  out        the file; by default RUN_ID.onnx, .pt2 or .safetensors here
  log        true: the file goes to the run's artifacts too, under export/
  segment    what it is checked with: a segment of the run's dataset, or two dates
  tolerance  the largest difference of a score, as a share of the largest score (1e-5)
  data       another source than the run's own: data=qlib data.provider_uri=...

onnx and torch take batches of any size and give the score that `qtorch predict` gives: x is
[batch, step_len, features] (flat networks: [batch, features * step_len]); networks of whole days
take x [days, instruments, ...] and a mask. FILE.json, and "qtorch" inside the file, tell every
input, the features in their order and step_len.

The file's scores of some days are compared with the model's own before it is written; a file that
differs is an error and is not left behind. Not included: the statistics of the dataset's
processors. x is what the dataset gives after its infer processors.
"""


def main(argv: Sequence[str]) -> int:
    """Load model and dataset of the run, export, check, write."""
    if any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0
    settings = composed("export", argv)
    configure_logging()
    path = _path(settings)
    if settings["tracking"].get("uri") is not None:
        init(tracking_uri=settings["tracking"]["uri"])
    from qtorch.study.export import export_model

    with interruptible():
        recorder = finished_run(settings["run"])
        model, dataset = model_and_dataset(recorder, settings.get("data"))
        done = export_model(
            model,
            dataset,
            path,
            format=settings["format"],
            segment=segment_of(settings["segment"], dataset),
            tolerance=settings["tolerance"],
            run=recorder.id,
        )
        if settings["log"]:
            for file in (done.path, done.description):
                recorder.log_artifact(file, "export")
    print(
        f"{done.path} ({done.num_bytes:,} bytes): {done.samples:,} scores equal the model's to "
        f"{done.difference:.1g} ({done.allowed:.1g} allowed)\n{done.description} tells its inputs"
    )
    if settings["log"]:
        print(f"both are artifacts of run {recorder.id}, under export/")
    return 0


def _path(settings: dict[str, Any]) -> Path:
    """The file to write; decided before the work, not after it."""
    from qtorch.study.export import SUFFIXES

    given, form = settings["out"], settings["format"]
    if form not in SUFFIXES:
        raise ConfigError(unknown_name("format", str(form), SUFFIXES))
    path = Path(given or settings["run"] + SUFFIXES[form]).expanduser()
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"out={given}: there is no folder {path.absolute().parent}.")
    if path.is_dir():
        raise ConfigError(f"out={given} is a folder; name the file in it.")
    return path
