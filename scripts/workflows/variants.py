"""Variations of Qlib's public workflow files beyond its benchmarks' settings.

    python scripts/workflows/variants.py FOLDER [NAME ...]

Writes the files and a small market into FOLDER and runs each by `qtorch run`, for one epoch on a
short span. Prints for each whether it runs, or the line by which it is refused.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qlib_workflows import build_workflow, write_market

SEGMENTS = {
    "train": ["2008-01-01", "2008-12-31"],
    "valid": ["2009-01-01", "2009-06-30"],
    "test": ["2009-07-01", "2009-12-31"],
}
EXPRESSIONS = [
    "Resi($close, 15)/$close",
    "Std(Abs($close/Ref($close, 1)-1)*$volume, 5)/(Mean(Abs($close/Ref($close, 1)-1), 5)+1e-12)",
    "Rsquare($close, 5)",
    "($high-$low)/$open",
    "Corr($close, Log($volume+1), 5)",
    "Corr($close/Ref($close,1), Log($volume/Ref($volume, 1)+1), 5)",
]

Workflow = dict[str, Any]


def short_workflow(name: str, provider_uri: str) -> Workflow:
    """Return a workflow of the benchmarks with a short span."""
    workflow = build_workflow(name, provider_uri)
    dataset = workflow["task"]["dataset"]["kwargs"]
    dataset["segments"] = {key: list(span) for key, span in SEGMENTS.items()}
    dataset["handler"]["kwargs"] |= {"end_time": "2010-01-29", "fit_end_time": "2008-12-31"}
    backtest = workflow["task"]["record"][2]["kwargs"]["config"]
    backtest["backtest"] |= dict(zip(("start_time", "end_time"), SEGMENTS["test"], strict=True))
    backtest["strategy"]["kwargs"] |= {"topk": 6, "n_drop": 2}
    model = workflow["task"]["model"]["kwargs"]
    if "n_epochs" in model:
        model["n_epochs"] = 1
    return workflow


VARIANTS: dict[str, tuple[str, Callable[[Workflow], None]]] = {}


def variant(base: str) -> Callable[[Callable[[Workflow], None]], Callable[[Workflow], None]]:
    """Register a function that changes a workflow of the benchmarks into a variant."""

    def register(change: Callable[[Workflow], None]) -> Callable[[Workflow], None]:
        VARIANTS[change.__name__] = (base, change)
        return change

    return register


def handler_config(workflow: Workflow) -> Workflow:
    """Return the configuration of the handler."""
    handler: Workflow = workflow["task"]["dataset"]["kwargs"]["handler"]
    return handler


def model_arguments(workflow: Workflow) -> Workflow:
    """Return the arguments of the model."""
    arguments: Workflow = workflow["task"]["model"]["kwargs"]
    return arguments


@variant("LightGBM-158-csi300")
def configurable_dataset(workflow: Workflow) -> None:
    """A DataHandlerLP with a loader of expressions, as LightGBM's configurable dataset."""
    dataset = workflow["task"]["dataset"]["kwargs"]
    names = [f"F{k}" for k in range(len(EXPRESSIONS))]
    label = [["Ref($close, -2)/Ref($close, -1) - 1"], ["LABEL0"]]
    loader = {
        "class": "QlibDataLoader",
        "kwargs": {"config": {"feature": [EXPRESSIONS, names], "label": label}, "freq": "day"},
    }
    dataset["handler"] = {
        "class": "DataHandlerLP",
        "module_path": "qlib.data.dataset.handler",
        "kwargs": {
            "start_time": "2008-01-01",
            "end_time": "2010-01-29",
            "instruments": "csi300",
            "data_loader": loader,
            "learn_processors": [
                {"class": "DropnaLabel"},
                {"class": "CSZScoreNorm", "kwargs": {"fields_group": "label"}},
            ],
        },
    }
    model_arguments(workflow)["num_boost_round"] = 5


@variant("LightGBM-158-csi300")
def multi_frequency(workflow: Workflow) -> None:
    """Bars of two frequencies with a handler of a file beside the workflow."""
    workflow["qlib_init"]["provider_uri"] = {
        "day": workflow["qlib_init"]["provider_uri"],
        "1min": workflow["qlib_init"]["provider_uri"],
    }
    workflow["qlib_init"] |= {"dataset_cache": None, "maxtasksperchild": None}
    handler = handler_config(workflow)
    handler |= {"class": "Avg15minHandler", "module_path": "multi_freq_handler.py"}
    handler["kwargs"] |= {
        "end_time": "2010-01-29 15:00:00",
        "freq": {"label": "day", "feature_15min": "1min", "feature_day": "day"},
        "inst_processors": {
            "feature_15min": [
                {
                    "class": "ResampleNProcessor",
                    "module_path": "features_resample_N.py",
                    "kwargs": {"target_frq": "15min"},
                }
            ]
        },
    }


@variant("LightGBM-158-csi300")
def high_frequency_tree(workflow: Workflow) -> None:
    """The two-class trees of minutes."""
    workflow["task"]["model"] = {
        "class": "HFLGBModel",
        "module_path": "qlib.contrib.model.highfreq_gdbt_model",
        "kwargs": {"objective": "binary", "metric": ["binary_logloss", "auc"], "num_leaves": 15},
    }
    handler_config(workflow)["kwargs"]["freq"] = "day"
    module = "qlib.workflow.record_temp"
    workflow["task"]["record"] = [
        {"class": name, "module_path": module, "kwargs": {}}
        for name in ("SignalRecord", "HFSignalRecord")
    ]


@variant("LightGBM-158-csi300")
def portfolio_optimizer(workflow: Workflow) -> None:
    """A portfolio by an optimizer with a risk model on disk, as examples/portfolio."""
    config = workflow["task"]["record"][2]["kwargs"]["config"]
    config["strategy"]["class"] = "EnhancedIndexingStrategy"
    config["strategy"]["kwargs"] = {
        "model": "<MODEL>",
        "dataset": "<DATASET>",
        "riskmodel_root": "./riskdata",
    }
    model_arguments(workflow)["num_boost_round"] = 5


@variant("LightGBM-158-csi300")
def executor_of_minutes(workflow: Workflow) -> None:
    """An executor of days around one of minutes."""
    config = workflow["task"]["record"][2]["kwargs"]["config"]
    inner = {
        "class": "SimulatorExecutor",
        "module_path": "qlib.backtest.executor",
        "kwargs": {"time_per_step": "30min", "generate_portfolio_metrics": True},
    }
    config["executor"] = {
        "class": "NestedExecutor",
        "module_path": "qlib.backtest.executor",
        "kwargs": {
            "time_per_step": "day",
            "inner_executor": inner,
            "inner_strategy": {
                "class": "TWAPStrategy",
                "module_path": "qlib.contrib.strategy.rule_strategy",
            },
        },
    }


@variant("LightGBM-158-csi300")
def simulator_executor(workflow: Workflow) -> None:
    """The usual executor, named."""
    workflow["task"]["record"][2]["kwargs"]["config"]["executor"] = {
        "class": "SimulatorExecutor",
        "module_path": "qlib.backtest.executor",
        "kwargs": {"time_per_step": "day", "generate_portfolio_metrics": True},
    }
    model_arguments(workflow)["num_boost_round"] = 5


@variant("Linear-158-csi500")
def dynamic_baseline_linear(workflow: Workflow) -> None:
    """The ridge regression of benchmarks_dynamic, which uses all instruments."""
    model_arguments(workflow).update(estimator="ridge", alpha=0.05)
    handler_config(workflow)["kwargs"]["instruments"] = "all"


@variant("TabNet-158-csi300")
def tabnet_with_segments_of_pretraining(workflow: Workflow) -> None:
    """TabNet with the segments of its pretraining, which are those of its training."""
    segments = workflow["task"]["dataset"]["kwargs"]["segments"]
    segments |= {"pretrain": SEGMENTS["train"], "pretrain_validation": SEGMENTS["valid"]}
    model_arguments(workflow).update(seed=993, n_epochs=1, pretrain_n_epochs=1, batch_size=512)


@variant("TRA-158-csi300")
def tra_full(workflow: Workflow) -> None:
    """TRA on all columns, with every argument of its file."""
    handler_config(workflow)["kwargs"]["infer_processors"].pop(0)
    model_arguments(workflow)["model_config"]["input_size"] = 158
    model_arguments(workflow).update(
        logdir="output/Alpha158_full",
        seed=0,
        init_state=None,
        freeze_model=False,
        freeze_predictors=False,
        early_stop=1,
    )
    workflow["task"]["dataset"]["kwargs"] |= {"input_size": None, "n_samples": None}


@variant("HIST-360-csi300")
def hist_without_files(workflow: Workflow) -> None:
    """HIST with the files that Qlib downloads."""
    model_arguments(workflow).update(
        model_path="benchmarks/LSTM/model_lstm_csi300.pkl",
        stock2concept="benchmarks/HIST/qlib_csi300_stock2concept.npy",
        stock_index="benchmarks/HIST/qlib_csi300_stock_index.npy",
    )


@variant("GATs-158-csi300")
def gats_with_weights(workflow: Workflow) -> None:
    """GATs from the weights of an LSTM in a file."""
    model_arguments(workflow).update(
        with_pretrain=True, model_path="benchmarks/LSTM/csi300_lstm_ts.pkl", n_jobs=20
    )


@variant("TCTS-360-csi300")
def tcts_with_labels(workflow: Workflow) -> None:
    """TCTS with its three labels and the second one as its target."""
    labels = ["Ref($close, -1) / $close - 1"]
    labels += [f"Ref($close, -{k + 1}) / Ref($close, -{k}) - 1" for k in (1, 2)]
    handler_config(workflow)["kwargs"]["label"] = labels


@variant("MLP-158-csi300")
def mlp_processors(workflow: Workflow) -> None:
    """The multilayer perceptron with its processors: one column less, gaps filled by day."""
    workflow["task"]["model"]["kwargs"] |= {"max_steps": 4, "eval_steps": 2, "batch_size": 512}
    model_arguments(workflow)["pt_model_kwargs"] = {"input_dim": 157}
    column = {"class": "DropCol", "kwargs": {"col_list": ["VWAP0"]}}
    handler_config(workflow)["kwargs"] |= {
        "process_type": "independent",
        "infer_processors": [
            column,
            {"class": "CSZFillna", "kwargs": {"fields_group": "feature"}},
        ],
        "learn_processors": [
            column,
            {"class": "DropnaProcessor", "kwargs": {"fields_group": "feature"}},
            "DropnaLabel",
            {"class": "CSZScoreNorm", "kwargs": {"fields_group": "label"}},
        ],
    }


@variant("GeneralPTNN-GRU-csi300")
def general_gru_to_mlp(workflow: Workflow) -> None:
    """GeneralPTNN with the multilayer perceptron on rows instead of windows."""
    model_arguments(workflow).update(
        pt_model_uri="qlib.contrib.model.pytorch_nn.Net",
        pt_model_kwargs={"input_dim": 20, "layers": [20]},
    )
    dataset = workflow["task"]["dataset"]
    dataset["class"] = "DatasetH"
    del dataset["kwargs"]["step_len"]


@variant("LSTM-158-csi300")
def temporal_fusion_transformer(workflow: Workflow) -> None:
    """TFT with its own folder on the path."""
    workflow["sys"] = {"rel_path": ["."]}
    workflow["task"]["model"] = {"class": "TFTModel", "module_path": "tft"}


@variant("LSTM-158-csi300")
def universe_with_filters(workflow: Workflow) -> None:
    """A universe with filters by expression and by name."""
    start, end = "2008-01-01", "2010-01-29"
    pipe = [
        {
            "filter_type": "ExpressionDFilter",
            "rule_expression": "$close > 0.001",
            "filter_start_time": start,
            "filter_end_time": end,
            "keep": False,
        },
        {
            "filter_type": "NameDFilter",
            "name_rule_re": "SH60.*",
            "filter_start_time": start,
            "filter_end_time": end,
        },
    ]
    handler_config(workflow)["kwargs"]["instruments"] = {"market": "csi300", "filter_pipe": pipe}


@variant("LSTM-158-csi300")
def records_alone(workflow: Workflow) -> None:
    """Records that are named without a module."""
    for record in workflow["task"]["record"]:
        del record["module_path"]
    workflow["task"]["record"][2]["kwargs"]["config"]["executor"] = {
        "class": "SimulatorExecutor",
        "module_path": "qlib.backtest.executor",
    }


@variant("LSTM-158-csi300")
def one_record(workflow: Workflow) -> None:
    """One record as a mapping, without a module."""
    workflow["task"]["record"] = {"class": "SignalRecord", "kwargs": {}}


@variant("ALSTM-360-csi300")
def handler_of_vwap(workflow: Workflow) -> None:
    """A variant of Alpha360 whose label is of the average prices."""
    handler_config(workflow)["class"] = "Alpha360vwap"
    del handler_config(workflow)["kwargs"]["label"]


@variant("Linear-158-csi300")
def strategy_by_signal(workflow: Workflow) -> None:
    """A strategy with the placeholders of model and dataset, and the other arguments of both."""
    config = workflow["task"]["record"][2]["kwargs"]["config"]
    config["strategy"]["kwargs"] = {
        "signal": ["<MODEL>", "<DATASET>"],
        "topk": 6,
        "n_drop": 2,
        "hold_thresh": 2,
        "only_tradable": True,
        "risk_degree": 0.9,
    }
    config["backtest"]["exchange_kwargs"] |= {"freq": "day", "subscribe_fields": ["$close"]}


@variant("Linear-158-csi300")
def several_passes(workflow: Workflow) -> None:
    """Several passes of the backtest with shuffled scores, and the records of the segments."""
    record = workflow["task"]["record"]
    record[2] |= {"class": "MultiPassPortAnaRecord"}
    record[2]["kwargs"] |= {"pass_num": 2, "shuffle_init_score": True}
    record.append(
        {"class": "MultiSegRecord", "module_path": "qlib.contrib.workflow.record_temp"}
        | {"kwargs": {"model": "<MODEL>", "dataset": "<DATASET>"}}
    )


def write_variants(folder: Path, provider_uri: str) -> Iterator[Path]:
    """Write all variants and yield their paths."""
    for name, (base, change) in VARIANTS.items():
        workflow = short_workflow(base, provider_uri)
        change(workflow)
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(workflow, sort_keys=False))
        yield path


def main() -> int:
    """Write and run the variants; return 1 if one ends by anything but a line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help="only names that begin so")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    provider_uri = write_market(options.folder)
    num_faults = 0
    for path in write_variants(options.folder, str(provider_uri.resolve())):
        if not path.stem.startswith(tuple(options.names) or ""):
            continue
        command = [sys.executable, "-m", "qtorch", "run", path.name, "log_level=WARNING"]
        process = subprocess.run(command, cwd=options.folder, capture_output=True, text=True)
        lines = process.stderr.strip().splitlines() or [""]
        is_line = process.returncode == 0 or lines[-1].startswith("error: ")
        num_faults += not is_line
        result = "runs" if process.returncode == 0 else lines[-1] if is_line else "\n".join(lines)
        print(f"{path.stem}: {result}", flush=True)
    return int(num_faults > 0)


if __name__ == "__main__":
    sys.exit(main())
