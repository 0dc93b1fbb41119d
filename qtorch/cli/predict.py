"""`qtorch predict`: the scores of a finished run for a segment, as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from qtorch.cli.compose import composed
from qtorch.cli.finished import finished_run, model_and_dataset, segment_of
from qtorch.cli.signals import interruptible
from qtorch.core.errors import ConfigError, DataError
from qtorch.core.runtime import configure_logging
from qtorch.core.session import init
from qtorch.core.wording import counted
from qtorch.record.signal import as_frame

USAGE = """\
qtorch predict: scores of a finished run

usage: qtorch predict run=RUN_ID [segment=test] out=scores.parquet [tracking.uri=...] [data=...]

  run      the run's id
  segment  a segment of its dataset, or dates: segment=[2020-01-01,2020-06-30]
  out      a .parquet or .csv file
  data     another source than the run's own: data=qlib data.provider_uri=...
"""


def main(argv: Sequence[str]) -> int:
    """Load model and dataset of the run, predict, write."""
    if any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0
    settings = composed("predict", argv)
    configure_logging()
    path = Path(settings["out"]).expanduser()
    write = _writer(path)
    if settings["tracking"].get("uri") is not None:
        init(tracking_uri=settings["tracking"]["uri"])
    with interruptible():
        recorder = finished_run(settings["run"])
        model, dataset = model_and_dataset(recorder, settings.get("data"))
        span = segment_of(settings["segment"], dataset)
        scores = as_frame(model.predict(dataset, segment=span))
    if not len(scores):
        raise DataError(f"segment {settings['segment']} holds no sample: nothing is written.")
    write(scores, path)
    print(f"{counted(len(scores), 'score')} of {_span(scores)} in {path}")
    return 0


def _writer(path: Path) -> Callable[[pd.DataFrame, Path], None]:
    """How to write a file of that name; decided before the work, not after it."""
    if path.suffix not in (".parquet", ".csv"):
        raise ConfigError(f"out={path}: expected a name that ends in .parquet or .csv.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"out={path}: there is no folder {path.absolute().parent}.")
    if path.suffix == ".csv":
        return lambda frame, to: frame.to_csv(to)
    return lambda frame, to: frame.to_parquet(to)


def _span(scores: pd.DataFrame) -> str:
    dates = scores.index.get_level_values("datetime")
    return f"{dates.min():%Y-%m-%d}..{dates.max():%Y-%m-%d}"
