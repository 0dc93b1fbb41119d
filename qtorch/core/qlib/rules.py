"""Rules of the table of Qlib's names that need more than a path: a function for each.

A rule reads Qlib's arguments of one class from its context and sets ours. It is called once, also
if several arguments have it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qtorch.core.errors import ConfigError
from qtorch.core.qlib.names import NAME_KEYS, qlib_name
from qtorch.core.qlib.notes import Notes, set_path
from qtorch.core.qlib.table import Entry, find_entry
from qtorch.core.session import map_paths, resolve_path

PLACEHOLDERS = ["<MODEL>", "<DATASET>"]
PREDICTION = "<PRED>"
PRETRAINING_SEGMENTS = ("pretrain", "pretrain_validation")
EXECUTOR = "SimulatorExecutor"
BENCHMARK = "SH000300"  # that of Qlib's backtest if none is set
INSTRUMENTS = 300  # of a day in Qlib's benchmarks, to count days for a number of samples


class Context:
    """One class of Qlib's whose arguments are being translated.

    `arguments` are Qlib's, with Qlib's defaults; `result` collects ours; `target` replaces the
    entry's own target if it is set; `parameters` are those of the rule in the table.
    """

    translate: Callable[..., Any]

    def __init__(
        self, entry: Entry, arguments: Mapping[str, Any], notes: Notes, location: str
    ) -> None:
        self.entry, self.arguments = entry, dict(arguments)
        self.notes, self.location = notes, location
        self.result: dict[str, Any] = {}
        self.target: str | None = None
        self.parameters: Mapping[str, Any] = {}
        self.used_rules: set[str] = set()

    def set(self, path: str, value: Any) -> None:
        """Set an argument of ours by its path."""
        self.result = set_path(self.result, path, value)

    def get(self, name: str, default: Any = None) -> Any:
        """Return an argument of Qlib's."""
        return self.arguments.get(name, default)

    def refuse(self, argument: str, text: str) -> ConfigError:
        """Return an error about an argument of Qlib's."""
        place = f"{self.location}.{argument}: " if self.location else ""
        return ConfigError(
            f"{place}{argument} of Qlib's {self.entry.title} is {self.get(argument)!r:.60}; {text}."
        )


def set_device(context: Context) -> None:
    """A negative GPU is the CPU; the number of a GPU is not used."""
    gpu = context.get("GPU")
    try:
        is_cpu = int(gpu) < 0
    except (TypeError, ValueError):
        is_cpu = str(gpu).strip() == "" or str(gpu).startswith("cpu")
    if is_cpu:
        context.set("trainer.accelerator", "cpu")
    else:
        reason = "the trainer chooses the device: trainer.accelerator, trainer.devices"
        context.notes.ignore("GPU", context.entry.title, reason)


def set_initial_weights(context: Context) -> None:
    """The weights that the network starts from: a file of weights, or with qtorch also a run.

    Raises ConfigError if there is no such file, without which Qlib's training fails as well. With
    the prefix `file:` the file may be one of the machine that trains.
    """
    name = context.parameters["argument"]
    value = context.get(name)
    if value is None or (value == "" and name == "init_state"):  # as in Qlib
        return
    if str(value).startswith(("run:", "file:")):
        context.set("init_from", value)
        return
    path = resolve_path(str(value))
    if not path.is_file():
        raise context.refuse(
            name,
            f"there is no file {path}, without which Qlib's training fails too. Set it to a file "
            "of weights that exists, or to run:RUN_ID for the weights of a run, or leave it out to "
            "start from random weights",
        )
    if name == "model_path":
        context.set("init_from", f"file:{path}")
        return
    context.notes.warn(
        f"{name}={value!r} of {context.entry.title} is not loaded, because its weights have other "
        "names in qtorch: Qlib's network starts from them, this one from random weights. To start "
        f"from the weights of a run, set {name}: run:RUN_ID; to start from random ones without "
        "this warning, leave it out"
    )


def set_concepts(context: Context) -> None:
    """The concepts of HIST belong to the dataset."""
    files = {name: context.get(name) for name in ("stock2concept", "stock_index")}
    missing = [name for name, file in files.items() if file is None]
    if missing:
        raise ConfigError(
            f"{context.location}: HIST needs {' and '.join(missing)}, the files of the concepts "
            "that each instrument belongs to."
        )
    concepts = {"_target_": context.parameters["target"], **files}
    context.notes.move("dataset", "extras.concept", concepts, "stock2concept of HIST")


def set_pretraining(context: Context) -> None:
    """The number of epochs of TabNet's pretraining, 0 without it."""
    epochs = context.get("pretrain_n_epochs") if context.get("pretrain") else 0
    context.set("module.pretrain_epochs", epochs)

    def remove_segments(dataset: Mapping[str, Any], task: Mapping[str, Any]) -> dict[str, Any]:
        segments = dict(dataset.get("segments") or {})
        for name in PRETRAINING_SEGMENTS:
            segments.pop(name, None)
        return {**dataset, "segments": segments}

    origin = "the segments pretrain and pretrain_validation of TabNet"
    context.notes.move("dataset", "segments", None, origin, remove_segments, is_needed=False)
    if epochs:
        context.notes.change(
            "TabNet is pretrained on the segments train and valid, not on segments of their own"
        )


def set_target_label(context: Context) -> None:
    """The main label of TCTS comes first here: the labels of the dataset are reordered."""
    index = abs(int(context.get("target_label")))
    if index == 0:
        return

    def reorder(dataset: Mapping[str, Any], task: Mapping[str, Any]) -> dict[str, Any]:
        handler = dataset.get("handler")
        labels = handler.get("label") if isinstance(handler, Mapping) else None
        if not isinstance(labels, list | tuple) or not all(isinstance(x, str) for x in labels):
            raise context.refuse(
                "target_label", "the main label is the first one here: put it first in the handler"
            )
        if index >= len(labels):
            raise context.refuse("target_label", f"the handler has {len(labels)} labels")
        ordered = [labels[index], *labels[:index], *labels[index + 1 :]]
        return set_path(dataset, "handler.label", ordered)

    context.notes.change(
        f"label {index} of TCTS (target_label) is the first label here, and the records compare "
        "the scores with it"
    )
    context.notes.move("dataset", "handler.label", index, "target_label of TCTS", reorder)


def set_transport(context: Context) -> None:
    """The training step of TRA, unless all predictors are averaged (transport_method: none)."""
    method = context.get("transport_method", "none")
    if method not in ("none", "router", "oracle"):
        raise context.refuse("transport_method", "expected none, router or oracle")
    if method == "none" and not context.get("pretrain"):
        return
    module: dict[str, Any] = {"_target_": context.parameters["target"]}
    defaults = {"lamb": 0.0, "rho": 0.99, "alpha": 1.0}
    module |= {name: context.get(name, default) for name, default in defaults.items()}
    if context.get("pretrain"):
        module["pretrain"] = int(context.get("early_stop"))
        context.notes.change(
            f"TRA is pretrained for {module['pretrain']} epochs (early_stop), within n_epochs"
        )
    if method == "oracle":
        context.notes.change(
            "TRA never routes a prediction by the label of its own date, as Qlib's oracle does"
        )
    context.set("module", module)


def set_whole_days(context: Context) -> None:
    """A batch of so many samples is one of whole days here."""
    days = max(1, round(int(context.get("batch_size")) / INSTRUMENTS))
    context.set("batch.days_per_batch", days)
    context.notes.change(
        f"a batch of {context.entry.title} has {days} whole days instead of "
        f"{context.get('batch_size')} samples"
    )


def set_torch_module(context: Context) -> None:
    """The network of pt_model_uri; it gets the window, or without one the features of a day."""
    name, arguments = context.get("pt_model_uri"), dict(context.get("pt_model_kwargs") or {})
    entry = find_entry(name) if isinstance(name, str) else None
    if entry is not None:
        config = {"class": name, "kwargs": arguments}
        location = f"{context.location}.pt_model_uri"
        context.set("network", context.translate(config, context.notes, location))
        return
    flat = {"_target_": context.parameters["flat_input"]}
    network = {"_target_": name, **arguments}
    if context.parameters.get("flat"):
        context.set("network", {**flat, "network": network})
        return
    context.set("network", network)

    def flatten(model: Mapping[str, Any], task: Mapping[str, Any]) -> dict[str, Any]:
        dataset = task.get("dataset")
        target = str(dataset.get("_target_", "")) if isinstance(dataset, Mapping) else ""
        if target.endswith("DatasetH") and not target.endswith("TSDatasetH"):
            return {**model, "network": {**flat, "network": model["network"]}}
        return dict(model)

    origin = "the shape of the input of pt_model_uri ([B, F] without windows)"
    context.notes.move("model", "network", flat, origin, flatten)


def set_plateau_scheduler(context: Context) -> None:
    """The scheduler of DNNModelPytorch: the usual one, or none."""
    scheduler = context.get("scheduler")
    if scheduler == "default":
        context.set("scheduler", {"scheduler": context.parameters["default"], "monitor": "loss"})
    elif scheduler is not None:
        raise context.refuse("scheduler", "expected 'default' or null")


def set_memory_dataset(context: Context) -> None:
    """The windows and batches of MTSDatasetH; batches belong to the model."""
    if context.get("input_size") is None:
        context.set("step_len", context.get("seq_len"))
        context.notes.change(
            "steps of a window without a row are filled from the instrument's other rows; those of "
            "Qlib's MTSDatasetH are left out, and in front of an instrument's first row there are "
            "the last rows of another instrument, also of later days"
        )
    else:
        context.target = context.parameters["columns"]  # the columns are the window
    if context.get("horizon"):
        context.set("horizon", context.get("horizon"))
    size = int(context.get("batch_size"))
    batch = {"size": size, "order": "random"}
    if size < 0:
        batch = {"order": "day", "days_per_batch": -size}
    context.notes.move("model", "batch", batch, "batch_size of MTSDatasetH")


def set_signal(context: Context) -> None:
    """The scores of a strategy: those of the run for its model and its dataset."""
    signal = context.get("signal")
    if signal is None and "model" in context.arguments:
        signal = [context.get("model"), context.get("dataset")]
    if isinstance(signal, list | tuple) and list(signal) == PLACEHOLDERS:
        signal = PREDICTION
    if signal is not None:
        context.set("signal", signal)


def set_portfolio(context: Context) -> None:
    """The backtest of a PortAnaRecord, with Qlib's benchmark if none is set."""
    config = context.get("config") or {}
    location = f"{context.location}.config"
    parts = {k: v for k, v in config.items() if k != "executor"}
    settings = context.translate(parts, context.notes, location)
    if config.get("executor") is not None:
        settings["executor"] = _translate_executor(config["executor"], context, location)
    backtest = dict(settings.get("backtest") or context.parameters["backtest"])
    backtest.setdefault("benchmark", BENCHMARK)
    settings["backtest"] = backtest
    context.set("config", settings)


def _translate_executor(executor: Any, context: Context, location: str) -> Any:
    """Return the executor's mapping, which the backtest reads itself; other classes are refused."""
    name = qlib_name(executor)
    if name is None or not name.endswith(f".{EXECUTOR}") or not isinstance(executor, Mapping):
        return context.translate(executor, context.notes, f"{location}.executor")
    arguments = {k: v for k, v in executor.items() if k not in (*NAME_KEYS, "module_path")}
    return {"class": EXECUTOR, **arguments}


def set_provider(context: Context) -> None:
    """The data folder, as an absolute path: the working folder may change."""
    provider = context.get("provider_uri")
    if not provider:
        raise context.refuse("provider_uri", "expected a folder in Qlib's format")
    context.set("provider_uri", map_paths(lambda path: str(resolve_path(path)), provider))


def set_experiment_manager(context: Context) -> None:
    """The tracking store of MLflowExpManager."""
    config = context.get("exp_manager")
    if config is None:
        return
    manager = config.get("class") if isinstance(config, Mapping) else None
    if str(manager).rpartition(".")[2] != "MLflowExpManager":
        raise context.refuse("exp_manager", "expected class: MLflowExpManager with its uri")
    uri = (config.get("kwargs") or {}).get("uri")
    if uri:
        context.set("tracking_uri", str(uri))


def set_task_store(context: Context) -> None:
    """The store of the task pools: a database of MongoDB, by its URL."""
    config = context.get("mongo")
    if config is None:
        return
    settings = config if isinstance(config, Mapping) else {}
    url, database = settings.get("task_url"), settings.get("task_db_name")
    if not isinstance(url, str) or not isinstance(database, str):
        raise context.refuse("mongo", "expected {task_url: mongodb://..., task_db_name: ...}")
    context.set("task_url", f"{url.rstrip('/')}/{database}")


def set_tree_parameters(context: Context) -> None:
    """Of LightGBM's two names of a parameter the main one counts, as in LightGBM itself."""
    for alias, name in context.parameters["names"].items():
        if alias not in context.arguments:
            continue
        if name in context.arguments:
            context.notes.ignore(alias, context.entry.title, f"{name} is set, which LightGBM uses")
        else:
            context.set(alias, context.get(alias))


RULES: dict[str, Callable[[Context], None]] = {
    "device": set_device,
    "initial_weights": set_initial_weights,
    "concepts": set_concepts,
    "pretraining": set_pretraining,
    "target_label": set_target_label,
    "transport": set_transport,
    "whole_days": set_whole_days,
    "torch_module": set_torch_module,
    "plateau_scheduler": set_plateau_scheduler,
    "memory_dataset": set_memory_dataset,
    "signal": set_signal,
    "portfolio": set_portfolio,
    "provider": set_provider,
    "experiment_manager": set_experiment_manager,
    "task_store": set_task_store,
    "tree_parameters": set_tree_parameters,
}
