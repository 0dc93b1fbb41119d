"""`qtorch predict`: write the scores of a finished run for a segment as a table."""

from __future__ import annotations

from collections.abc import Sequence

from qtorch.cli.compose import compose_settings
from qtorch.cli.guard import configure_process, handle_stop_signals
from qtorch.cli.options import output_path
from qtorch.cli.runs import load_finished_run, load_model_and_dataset, parse_segment
from qtorch.core.errors import ConfigError, DataError, format_count
from qtorch.record.signal import predict_frame

USAGE = """\
qtorch predict: write the scores of a finished run

usage: qtorch predict run=RUN_ID [segment=test] out=scores.parquet [tracking.uri=...] [data=...]
                      [allow_nonfinite=true]

  run      the run ID, its first digits, a name, or latest
  segment  a segment of the run's dataset, or dates: segment=[2020-01-01,2020-06-30]
  out      a .parquet or .csv file
  data     use another data source: data=qlib data.provider_uri=...
  allow_nonfinite  true: write NaN and infinite scores too, with a warning instead of an error
"""


def main(argv: Sequence[str]) -> int:
    """Load the run's model and dataset, predict and write the scores."""
    settings = compose_settings("predict", argv)
    configure_process(tracking_uri=settings["tracking"].get("uri"))
    path = output_path(settings["out"])
    if path.suffix not in (".parquet", ".csv"):
        raise ConfigError(f"out={path}: expected a name that ends in .parquet or .csv.")
    with handle_stop_signals():
        recorder = load_finished_run(settings["run"])
        model, dataset = load_model_and_dataset(
            recorder, settings.get("data"), allow_nonfinite=settings["allow_nonfinite"]
        )
        span = parse_segment(settings["segment"], dataset)
        scores = predict_frame(model, dataset, span)
    if not len(scores):
        raise DataError(f"segment {settings['segment']} contains no samples; no file was written.")
    if path.suffix == ".csv":
        scores.to_csv(path)
    else:
        scores.to_parquet(path)
    dates = scores.index.get_level_values("datetime")
    print(
        f"{format_count(len(scores), 'score')} for {dates.min():%Y-%m-%d}..{dates.max():%Y-%m-%d} "
        f"saved to {path}"
    )
    return 0
