"""Is fine-tuning worth it? Pretrain on one half of a universe, then tune on the other half.

python scripts/finetune_study.py
python scripts/finetune_study.py --provider-uri ~/qlib_data --universe nyse500

For each seed, a network is pretrained on several years of the first half, and then trained on nine
months of the second half with several methods: from scratch, only the head, LoRA, all weights. The
unchanged pretrained network is evaluated too. The halves are every second instrument by name. All
methods select the best epoch on the same months with the same patience. Uses one thread; the
tables are Markdown.

Without --provider-uri the bars are synthetic, with another market for each seed, and the planted
signal changes at the start of 2015 (`SyntheticSource.regimes`): momentum hardly pays from then on,
while the recent return still reverts. The pretrained network therefore knows a part of the new
signal, and the nine months alone are few data. "true" is the mean Rank IC of the predictions with
the planted score.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from workflow_by_code import COLUMNS

import qtorch
from qtorch import init_instance_by_config
from qtorch.core.runtime import configure_logging
from qtorch.data import SyntheticSource
from qtorch.data.source.qlib import QlibSource
from qtorch.metrics.signal import calc_ic
from qtorch.model import LightningModel

YEARS = {
    "pretrain": ("2008-01-01", "2013-12-31"),
    "pretrain valid": ("2014-01-01", "2014-12-31"),
    "tune": ("2015-01-01", "2015-09-30"),
    "valid": ("2015-10-01", "2015-12-31"),
    "test": ("2016-01-01", "2017-11-30"),
}
EMBEDDED = {"start_time": "2008-01-01", "end_time": "2017-12-29"}
REGIME_CHANGE = "2015-01-01"
COLUMN_NAMES = ("IC", "Rank IC", "true", "best epoch", "epochs", "CPU s")
NUM_SCORES = 3  # the first columns are scores, the others the cost of training
PRETRAINED, SCRATCH = "pretrained, unchanged", "from scratch"


def build_source(arguments: argparse.Namespace, seed: int) -> Any:
    """The source of the bars: the folder's, or a synthetic market for the seed."""
    if arguments.provider_uri is not None:
        return QlibSource(arguments.provider_uri)
    num, regimes = arguments.instruments or 60, {REGIME_CHANGE: arguments.regime}
    return SyntheticSource(num, **EMBEDDED, signal=arguments.signal, seed=seed, regimes=regimes)


def split_universe(arguments: argparse.Namespace, seed: int) -> tuple[Any, list[str], list[str]]:
    """Return the source and the two halves of its universe: every second instrument each."""
    source = build_source(arguments, seed)
    universe = arguments.universe or ("all" if arguments.provider_uri else "stocks")
    names = sorted(source.instruments(universe))[: arguments.instruments]
    return source, names[::2], names[1::2]


def build_dataset(source: Any, names: list[str], parts: dict[str, str], step_len: int) -> Any:
    """A window dataset of one half; its processors are fitted on its own train segment."""
    handler = {
        "_target_": "qtorch.data.Alpha158",
        "source": source.to_config(),
        "instruments": names,
        "columns": COLUMNS,
        "infer_processors": [
            {"class": "RobustZScoreNorm",
             "kwargs": {"fields_group": "feature", "clip_outlier": True}},
            {"class": "Fillna", "kwargs": {"fields_group": "feature"}},
        ],
        "learn_processors": [
            {"class": "DropnaLabel"},
            {"class": "CSRankNorm", "kwargs": {"fields_group": "label"}},
        ],
    }  # fmt: skip
    segments = {name: YEARS[part] for name, part in parts.items()}
    first, last = min(s for s, _ in segments.values()), max(e for _, e in segments.values())
    return init_instance_by_config(
        {
            "_target_": "qtorch.data.TSDatasetH",
            "handler": {**handler, "start_time": first, "end_time": last},
            "segments": segments,
            "step_len": step_len,
        }
    )


def build_model(arguments: argparse.Namespace, seed: int) -> LightningModel:
    """An untrained GRU, the same for all methods."""
    return LightningModel(
        {
            "_target_": "qtorch.nn.GRU",
            "hidden_size": arguments.hidden_size,
            "num_layers": arguments.num_layers,
        },
        optimizer={"_target_": "torch.optim.Adam", "lr": arguments.lr},
        batch={"size": arguments.batch_size},
        trainer={
            "max_epochs": arguments.epochs,
            "accelerator": "cpu",
            "enable_progress_bar": False,
        },
        monitor=arguments.monitor,
        early_stop=arguments.patience,
        checkpoint={"enabled": False},
        seed=seed,
    )


def evaluate_model(
    model: LightningModel, dataset: Any, planted_score: pd.Series | None, seconds: float
) -> dict[str, float]:
    """The metrics of a model on the test years, and the cost of its training."""
    label = dataset.samples("test").frame(["raw_label"])["raw_label"].iloc[:, 0]
    score = model.predict(dataset)
    ic, rank_ic = calc_ic(score, label)
    planted_rank_ic = (
        float("nan") if planted_score is None else calc_ic(score, planted_score)[1].mean()
    )
    report = model.fit_report_ if seconds else {}
    cost = (report.get("best_epoch", -1) + 1, report.get("epochs", 0), seconds)
    return dict(zip(COLUMN_NAMES, (ic.mean(), rank_ic.mean(), planted_rank_ic, *cost), strict=True))


def get_planted_score(source: Any) -> pd.Series | None:
    """The score that a perfect model would predict; None if unknown (real data)."""
    if not isinstance(source, SyntheticSource):
        return None
    return source.signal_scores().to_frame()["score"]


def measure_cpu_seconds(function: Callable[[], None]) -> float:
    """CPU seconds of a function, which do not depend on other load of the machine."""
    start = time.process_time()
    function()
    return time.process_time() - start


def build_data(arguments: argparse.Namespace, seed: int) -> tuple[Any, Any, pd.Series | None]:
    """The datasets to pretrain and to tune on, and the planted score (None for real data)."""
    source, first, second = split_universe(arguments, seed)
    pretrain_parts = {"train": "pretrain", "valid": "pretrain valid"}
    tune_parts = {"train": "tune", "valid": "valid", "test": "test"}
    step_len = arguments.step_len
    datasets = (
        build_dataset(source, first, pretrain_parts, step_len),
        build_dataset(source, second, tune_parts, step_len),
    )
    return *datasets, get_planted_score(source)


def run_seed(arguments: argparse.Namespace, seed: int, data: Any) -> pd.DataFrame:
    """Train with all methods for one seed; return a frame of results by method."""
    pretrain_data, tune_data, planted_score = data
    rows = {}
    pretrained_model, scratch_model = build_model(arguments, seed), build_model(arguments, seed)
    scratch_model.trainer["max_epochs"] = arguments.tune_epochs
    seconds = measure_cpu_seconds(lambda: pretrained_model.fit(pretrain_data))
    print(
        f"seed {seed}: pretrained in {seconds:.0f} s, "
        f"{pretrained_model.fit_report_['epochs']} epochs"
    )
    rows[PRETRAINED] = evaluate_model(pretrained_model, tune_data, planted_score, 0.0)
    seconds = measure_cpu_seconds(lambda: scratch_model.fit(tune_data))
    rows[SCRATCH] = evaluate_model(scratch_model, tune_data, planted_score, seconds)
    methods: dict[str, dict[str, Any]] = {
        "head only": {"train": "head", "lr": arguments.lr},
        f"LoRA, rank {arguments.rank}": {"lora": {"rank": arguments.rank}, "lr": arguments.lr},
        "all weights": {"lr": arguments.tune_lr},
    }
    for method, options in methods.items():
        model, kwargs = (
            copy.deepcopy(pretrained_model),
            {"max_epochs": arguments.tune_epochs, **options},
        )
        seconds = measure_cpu_seconds(lambda m=model, g=kwargs: m.finetune(tune_data, **g))
        rows[method] = evaluate_model(model, tune_data, planted_score, seconds)
    return pd.DataFrame(rows).T


def format_table(parts: list[pd.DataFrame]) -> str:
    """Format the mean and the range (maximum - minimum) over the seeds as a table."""
    values = np.stack([part.to_numpy() for part in parts])  # [seeds, methods, columns]
    mean, spread = values.mean(0), values.max(0) - values.min(0)
    lines = [f"| | {' | '.join(COLUMN_NAMES)} |", "|---" * (1 + len(COLUMN_NAMES)) + "|"]
    for k, method in enumerate(parts[0].index):
        pairs = zip(mean[k, :NUM_SCORES], spread[k, :NUM_SCORES], strict=True)
        cells = ["-" if np.isnan(m) else f"{m:.4f} ({s:.4f})" for m, s in pairs]
        cells += [f"{m:.1f}" for m in mean[k, NUM_SCORES:]] if mean[k, -1] else ["-"] * 3
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def metric_gains(
    parts: list[pd.DataFrame], method: str, baseline: str, metric: str = "Rank IC"
) -> pd.Series:
    """The difference of a metric between two methods, by seed (on the same bars)."""
    return pd.Series([part.loc[method, metric] - part.loc[baseline, metric] for part in parts])


def format_gains(parts: list[pd.DataFrame]) -> str:
    """Format the gains of each tuning method over the pretrained and over the scratch network.

    Cells show the mean over the seeds, its standard error, and the number of seeds with a gain.
    """
    lines = [
        "| gain in Rank IC over | the pretrained network | a network from scratch |",
        "|---|---|---|",
    ]
    for method in parts[0].index.drop([PRETRAINED, SCRATCH]):
        gains = [metric_gains(parts, method, baseline) for baseline in (PRETRAINED, SCRATCH)]
        cells = [
            f"{g.mean():+.4f} ± {g.std() / len(g) ** 0.5:.4f}, {(g > 0).sum()} of {len(g)}"
            for g in gains
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def signal_rank_ic_text(arguments: argparse.Namespace) -> str:
    """A sentence with the Rank IC of the planted score in the test years; empty for real data."""
    if arguments.provider_uri is not None:
        return ""
    sources = [build_source(arguments, seed) for seed in range(arguments.seeds)]
    rank_ics = [s.signal_rank_ic(*YEARS["test"]).mean() for s in sources]
    return f" The planted score's own Rank IC is {np.mean(rank_ics):.4f}."


def main(arguments: argparse.Namespace) -> None:
    """Train all networks and print the tables."""
    configure_logging("WARNING")
    qtorch.init(seed=0)
    torch.set_num_threads(1)
    start = time.process_time()
    results, data = [], None
    for seed in range(arguments.seeds):
        if data is None or arguments.provider_uri is None:
            data = build_data(arguments, seed)
        results.append(run_seed(arguments, seed, data))
    _, first, second = split_universe(arguments, 0)
    spans = ", ".join(f"{name} {span[0][:7]}..{span[1][:7]}" for name, span in YEARS.items())
    print(
        f"\nGRU {arguments.hidden_size} x {arguments.num_layers}, 20 columns of Alpha158, "
        f"{arguments.step_len} steps; {len(first)} instruments to pretrain on, {len(second)} "
        f"others to tune on; {spans}. At most {arguments.epochs} epochs for pretraining and "
        f"{arguments.tune_epochs} for tuning, patience {arguments.patience} by valid "
        f"{arguments.monitor}; learning rate {arguments.lr:g}, for tuning all weights "
        f"{arguments.tune_lr:g}. {arguments.seeds} seeds: mean (maximum - minimum). One thread, "
        f"{time.process_time() - start:.0f} s in total.{signal_rank_ic_text(arguments)}\n\n"
        f"{format_table(results)}\n\n{format_gains(results)}"
    )


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--provider-uri", help="a folder in Qlib's layout; default: synthetic bars")
    parser.add_argument(
        "--universe", help="default: all instruments of the folder, or the synthetic stocks"
    )
    parser.add_argument("--instruments", type=int, help="use only the first N of the universe")
    parser.add_argument(
        "--signal",
        type=float,
        default=0.12,
        help="strength of the planted signal of the synthetic bars",
    )
    parser.add_argument("--regime", type=float, nargs=2, default=(-0.8, 0.1))
    parser.add_argument("--step-len", type=int, default=5)
    parser.add_argument("--hidden-size", type=int, default=16)
    parser.add_argument("--num-layers", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--tune-epochs", type=int, default=20)
    parser.add_argument("--patience", type=int, default=4)
    parser.add_argument("--monitor", default="rank_ic")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--tune-lr", type=float, default=5e-4)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=10)
    return parser


if __name__ == "__main__":
    main(build_parser().parse_args())
