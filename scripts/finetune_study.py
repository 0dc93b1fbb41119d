"""Is fine-tuning worth it? Pretrain on half of a universe, learn on with the other's last year.

python scripts/finetune_study.py
python scripts/finetune_study.py --provider-uri ~/qlib_data --universe nyse500

Each seed trains a network on the first half's years, then on the other half's nine months: from
scratch, the head alone, LoRA, all weights; and the pretrained network as it is. Every second
instrument by name is of a half. All choose their best epoch on the same months, with the same
patience. One thread; the tables are Markdown.

Without --provider-uri the bars are synthetic, a market of its own for each seed, and what they
reward changes as 2015 begins (`SyntheticSource.regimes`): momentum hardly pays from then on, the
recent return still reverts. So the old network knows a part of what the new half's bars show, and
those alone are few. "true" is the mean Rank IC of the predictions with the planted score.
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
    "learn on": ("2015-01-01", "2015-09-30"),
    "valid": ("2015-10-01", "2015-12-31"),
    "test": ("2016-01-01", "2017-11-30"),
}
EMBEDDED = {"start_time": "2008-01-01", "end_time": "2017-12-29"}
CHANGE = "2015-01-01"
FIGURES = ("IC", "Rank IC", "true", "best epoch", "epochs", "CPU s")
SCORES = 3  # of the figures; the others are what it cost
OLD, SCRATCH = "pretrained, as it is", "from scratch"


def source_of(arguments: argparse.Namespace, seed: int) -> Any:
    """The bars of a seed: a market of its own, or the folder's."""
    if arguments.provider_uri is not None:
        return QlibSource(arguments.provider_uri)
    num, regimes = arguments.instruments or 60, {CHANGE: arguments.regime}
    return SyntheticSource(num, **EMBEDDED, signal=arguments.signal, seed=seed, regimes=regimes)


def halves(arguments: argparse.Namespace, seed: int) -> tuple[Any, list[str], list[str]]:
    """The source, and every second instrument of its universe each."""
    source = source_of(arguments, seed)
    universe = arguments.universe or ("all" if arguments.provider_uri else "stocks")
    names = sorted(source.instruments(universe))[: arguments.instruments]
    return source, names[::2], names[1::2]


def dataset_of(source: Any, names: list[str], parts: dict[str, str], step_len: int) -> Any:
    """Windows of a half; its processors are fitted on its own train segment."""
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


def model_of(arguments: argparse.Namespace, seed: int) -> LightningModel:
    """A GRU as all four begin with it."""
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


def figures(
    model: LightningModel, dataset: Any, planted: pd.Series | None, seconds: float
) -> dict[str, float]:
    """What a model scores on the test years, and what it cost."""
    label = dataset.samples("test").frame(["raw_label"])["raw_label"].iloc[:, 0]
    score = model.predict(dataset)
    ic, rank_ic = calc_ic(score, label)
    true = float("nan") if planted is None else calc_ic(score, planted)[1].mean()
    report = model.fit_report_ if seconds else {}
    cost = (report.get("best_epoch", -1) + 1, report.get("epochs", 0), seconds)
    return dict(zip(FIGURES, (ic.mean(), rank_ic.mean(), true, *cost), strict=True))


def planted_score(source: Any) -> pd.Series | None:
    """What a perfect model would give, where that is known."""
    if not isinstance(source, SyntheticSource):
        return None
    return source.planted_signal().to_frame()["score"]


def timed(act: Callable[[], None]) -> float:
    """Seconds of the CPU that it took: the same on a machine that others use too."""
    begin = time.process_time()
    act()
    return time.process_time() - begin


def data_of(arguments: argparse.Namespace, seed: int) -> tuple[Any, Any, pd.Series | None]:
    """What is pretrained on, what is learnt on with, and the planted score where there is one."""
    source, first, second = halves(arguments, seed)
    old = {"train": "pretrain", "valid": "pretrain valid"}
    new = {"train": "learn on", "valid": "valid", "test": "test"}
    step_len = arguments.step_len
    made = dataset_of(source, first, old, step_len), dataset_of(source, second, new, step_len)
    return *made, planted_score(source)


def one_seed(arguments: argparse.Namespace, seed: int, data: Any) -> pd.DataFrame:
    """Every way of learning on, for one seed; figures by way."""
    old, new, planted = data
    rows = {}
    pretrained, own = model_of(arguments, seed), model_of(arguments, seed)
    own.trainer["max_epochs"] = arguments.tune_epochs
    seconds = timed(lambda: pretrained.fit(old))
    print(f"seed {seed}: pretrained in {seconds:.0f} s, {pretrained.fit_report_['epochs']} epochs")
    rows[OLD] = figures(pretrained, new, planted, 0.0)
    seconds = timed(lambda: own.fit(new))
    rows[SCRATCH] = figures(own, new, planted, seconds)
    ways: dict[str, dict[str, Any]] = {
        "head only": {"train": "head", "lr": arguments.lr},
        f"LoRA, rank {arguments.rank}": {"lora": {"rank": arguments.rank}, "lr": arguments.lr},
        "all weights": {"lr": arguments.tune_lr},
    }
    for way, options in ways.items():
        model, given = copy.deepcopy(pretrained), {"max_epochs": arguments.tune_epochs, **options}
        seconds = timed(lambda m=model, g=given: m.finetune(new, **g))
        rows[way] = figures(model, new, planted, seconds)
    return pd.DataFrame(rows).T


def table(parts: list[pd.DataFrame]) -> str:
    """Mean and spread (largest less smallest) over the seeds."""
    values = np.stack([part.to_numpy() for part in parts])  # [seeds, ways, figures]
    mean, spread = values.mean(0), values.max(0) - values.min(0)
    lines = [f"| | {' | '.join(FIGURES)} |", "|---" * (1 + len(FIGURES)) + "|"]
    for k, way in enumerate(parts[0].index):
        both = zip(mean[k, :SCORES], spread[k, :SCORES], strict=True)
        cells = ["-" if np.isnan(m) else f"{m:.4f} ({s:.4f})" for m, s in both]
        cells += [f"{m:.1f}" for m in mean[k, SCORES:]] if mean[k, -1] else ["-"] * 3
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gain(parts: list[pd.DataFrame], way: str, other: str, figure: str = "Rank IC") -> pd.Series:
    """By how much one way's figure is above another's, seed by seed: the same bars for both."""
    return pd.Series([part.loc[way, figure] - part.loc[other, figure] for part in parts])


def gains(parts: list[pd.DataFrame]) -> str:
    """The gains of each fine-tuning over not tuning and over beginning anew: mean over the seeds,
    its standard error, and the seeds in which it is above."""
    lines = ["| Rank IC above that of | the old network | one from scratch |", "|---|---|---|"]
    for way in parts[0].index.drop([OLD, SCRATCH]):
        found = [gain(parts, way, other) for other in (OLD, SCRATCH)]
        cells = [
            f"{g.mean():+.4f} ± {g.std() / len(g) ** 0.5:.4f}, {(g > 0).sum()} of {len(g)}"
            for g in found
        ]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def most(arguments: argparse.Namespace) -> str:
    """The Rank IC of the planted score itself in the test years, where there is one."""
    if arguments.provider_uri is not None:
        return ""
    sources = [source_of(arguments, seed) for seed in range(arguments.seeds)]
    known = [s.planted_rank_ic(*YEARS["test"]).mean() for s in sources]
    return f" The planted score's own Rank IC is {np.mean(known):.4f}."


def main(arguments: argparse.Namespace) -> None:
    """Train them all, print the tables."""
    configure_logging("WARNING")
    qtorch.init(seed=0)
    torch.set_num_threads(1)
    begin = time.process_time()
    found, data = [], None
    for seed in range(arguments.seeds):
        if data is None or arguments.provider_uri is None:
            data = data_of(arguments, seed)
        found.append(one_seed(arguments, seed, data))
    _, first, second = halves(arguments, 0)
    spans = ", ".join(f"{name} {span[0][:7]}..{span[1][:7]}" for name, span in YEARS.items())
    print(
        f"\nGRU {arguments.hidden_size} x {arguments.num_layers}, 20 columns of Alpha158, "
        f"{arguments.step_len} steps; {len(first)} instruments to pretrain, {len(second)} others "
        f"to learn on; {spans}. At most {arguments.epochs} epochs, then {arguments.tune_epochs}, "
        f"patience {arguments.patience} by valid {arguments.monitor}; rate {arguments.lr:g}, for "
        f"all weights again {arguments.tune_lr:g}. {arguments.seeds} seeds: mean (largest less "
        f"smallest). One thread, {time.process_time() - begin:.0f} s in all.{most(arguments)}\n\n"
        f"{table(found)}\n\n{gains(found)}"
    )


def parser() -> argparse.ArgumentParser:
    """What the command line may say."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    found.add_argument("--provider-uri", help="a folder in Qlib's layout; default: synthetic bars")
    found.add_argument("--universe", help="default: all of the folder's, or the synthetic stocks")
    found.add_argument("--instruments", type=int, help="so many of the universe alone")
    found.add_argument("--signal", type=float, default=0.12, help="of the synthetic bars")
    found.add_argument("--regime", type=float, nargs=2, default=(-0.8, 0.1))
    found.add_argument("--step-len", type=int, default=5)
    found.add_argument("--hidden-size", type=int, default=16)
    found.add_argument("--num-layers", type=int, default=1)
    found.add_argument("--batch-size", type=int, default=500)
    found.add_argument("--epochs", type=int, default=6)
    found.add_argument("--tune-epochs", type=int, default=20)
    found.add_argument("--patience", type=int, default=4)
    found.add_argument("--monitor", default="rank_ic")
    found.add_argument("--lr", type=float, default=2e-3)
    found.add_argument("--tune-lr", type=float, default=5e-4)
    found.add_argument("--rank", type=int, default=4)
    found.add_argument("--seeds", type=int, default=10)
    return found


if __name__ == "__main__":
    main(parser().parse_args())
