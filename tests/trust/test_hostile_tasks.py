"""No entry point in Python runs what a task, model, dataset or pickle of a stranger names."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import sqlite3
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hostile_things import COMMAND, NAMES, PICKLES, change_everywhere, hostile_configs

from qtorch.core.instantiate import init_instance_by_config
from qtorch.core.trust import as_stored_text
from qtorch.study.export import load_network
from qtorch.task.manager import TaskManager
from qtorch.task.run import run_task
from qtorch.task.worker_process import serve_request
from qtorch.tracking.artifacts import read_object, write_object
from qtorch.trainer.run import task_train

pytestmark = pytest.mark.slow

CONFIGS = list(hostile_configs())
# Arguments of a task that are resolved at different times: at the first batch, at the end, ...
LATE_ARGUMENTS = (
    *("loss", "optimizer", "scheduler", "module", "network", "metrics", "sampler"),
    *("callbacks", "early_stop", "checkpoint"),
)
TRAINER_ARGUMENTS = ("callbacks", "logger", "profiler", "strategy", "plugins", "accelerator")


def tiny_task() -> dict[str, Any]:
    """A task that trains in a fraction of a second."""
    handler = {
        "_target_": "qtorch.data.DataHandlerLP",
        "source": {"_target_": "qtorch.data.SyntheticSource", "num_instruments": 6, "seed": 1},
        "instruments": "all",
        "start_time": "2015-01-01",
        "end_time": "2015-04-30",
        "data_loader": {
            "_target_": "qtorch.data.QlibDataLoader",
            "config": {"feature": [["$close/$open"], ["a"]], "label": [["Ref($close,-1)"], ["y"]]},
        },
        "learn_processors": [{"_target_": "qtorch.data.processor.DropnaLabel"}],
        "infer_processors": [{"_target_": "qtorch.data.processor.Fillna"}],
    }
    segments = {"train": ["2015-01-01", "2015-02-28"], "test": ["2015-03-01", "2015-04-30"]}
    return {
        "model": {
            "_target_": "qtorch.model.LightningModel",
            "network": {"_target_": "qtorch.nn.MLP", "layers": [2]},
            "loss": "mse",
            "optimizer": {"_target_": "torch.optim.Adam", "lr": 0.01},
            "trainer": {"max_epochs": 1, "accelerator": "cpu"},
        },
        "dataset": {"_target_": "qtorch.data.DatasetH", "handler": handler, "segments": segments},
        "record": [{"_target_": "qtorch.record.SignalRecord"}],
        "seed": 1,
    }


def hostile_tasks() -> list[tuple[str, dict[str, Any]]]:
    """Every kind of hostile part at every place of a task."""
    tasks = []
    places = list(change_everywhere(tiny_task(), None))
    for (title, config), (place, _) in zip(CONFIGS, itertools.cycle(places), strict=False):
        changed = dict(change_everywhere(tiny_task(), config))[place]
        tasks.append((f"{title} at {place}", changed))
    for place, _ in places:
        for title, config in random.Random(place).sample(CONFIGS, 1):
            changed = dict(change_everywhere(tiny_task(), config))[place]
            tasks.append((f"{title} at {place}", changed))
    for argument in LATE_ARGUMENTS:
        for title, config in random.Random(argument).sample(CONFIGS, 6):
            task = tiny_task()
            task["model"][argument] = config
            tasks.append((f"{title} as {argument}", task))
    outside = "/var/tmp/hostile"
    for place in ("dataset.handler.cache", "model.trainer.default_root_dir", "model.cache"):
        task: dict[str, Any] = tiny_task()
        *parents, name = place.split(".")
        owner = task
        for key in parents:
            owner = owner[key]
        owner[name] = outside
        tasks.append((f"a folder as {place}", task))
    for argument in TRAINER_ARGUMENTS:
        for title, config in random.Random(argument).sample(CONFIGS, 6):
            task = tiny_task()
            task["model"]["trainer"][argument] = config
            tasks.append((f"{title} as trainer.{argument}", task))
    return tasks


# Places of a task whose configuration is built, so that `os.system` there would be called.
PLACES_OF_CALLS = (
    *("model", "dataset", "reweighter", "record.0"),
    *("model.network", "model.loss"),
    *("model.trainer.callbacks.0", "model.trainer.logger", "model.trainer.strategy"),
    *("dataset.handler", "dataset.handler.source", "dataset.handler.data_loader"),
    *("dataset.handler.learn_processors.0", "dataset.handler.infer_processors.0"),
)


def task_with_a_command(place: str) -> dict[str, Any]:
    """A task that runs a command unless the rule prevents it."""
    task = tiny_task()
    task["model"]["trainer"]["callbacks"] = [None]
    *parents, name = place.split(".")
    owner: Any = task
    for key in parents:
        owner = owner[int(key) if key.isdigit() else key]
    owner[int(name) if name.isdigit() else name] = {"_target_": "os.system", "_args_": [COMMAND]}
    return task


def store_and_load(value: Any, folder: Path) -> Any:
    """Store a value as an artifact and load it, as from a stranger's store."""
    return read_object(write_object(value, folder, "thing"), "thing")


def test_task_of_the_corpus_trains_if_nothing_is_hostile(watch, tmp_path):
    with watch():
        recorder = task_train(store_and_load(tiny_task(), tmp_path), "own")
    assert recorder.status == "FINISHED"


@pytest.mark.parametrize(
    "config",
    [
        {"_target_": "os.system", "_args_": [COMMAND]},
        {"_target_": "subprocess.getoutput", "_args_": ["true"]},
        {"_target_": "evil_module.go"},
        {"_target_": "builtins.open", "_args_": ["/var/tmp/hostile-mark", "w"]},
    ],
)
def test_watch_notices_code_that_runs(watch, config):
    with pytest.raises(AssertionError), watch():
        init_instance_by_config(config)  # not stored text, so it is not restricted
    Path("/var/tmp/hostile-mark").unlink(missing_ok=True)


@pytest.mark.parametrize("place", PLACES_OF_CALLS)
def test_command_at_this_place_runs_if_the_task_is_the_users(watch, place):
    with pytest.raises(AssertionError), watch(), contextlib.suppress(Exception):
        task_train(task_with_a_command(place), "own")


@pytest.mark.parametrize(("title", "config"), CONFIGS, ids=[t for t, _ in CONFIGS])
def test_stored_configuration_runs_nothing(watch, tmp_path, title, config):
    stored = store_and_load(config, tmp_path)
    with watch(title), contextlib.suppress(Exception):
        init_instance_by_config(stored)
    with watch(title), contextlib.suppress(Exception):
        init_instance_by_config(stored, default_module="qtorch.data.processor")


def test_stored_task_runs_nothing(watch, tmp_path):
    tasks = [*hostile_tasks(), *((place, task_with_a_command(place)) for place in PLACES_OF_CALLS)]
    assert len(tasks) > 250
    for title, task in tasks:
        with watch(title), contextlib.suppress(Exception):
            task_train(store_and_load(task, tmp_path), "own")


def test_pool_task_runs_nothing(watch, tmp_path):
    url = f"sqlite:///{tmp_path}/tasks.db"
    manager = TaskManager("theirs", url)
    tasks = [(place, task_with_a_command(place)) for place in PLACES_OF_CALLS]
    tasks += random.Random(0).sample(hostile_tasks(), 15)
    ids = manager.create_task([{**tiny_task(), "seed": k} for k in range(len(tasks))])
    with sqlite3.connect(tmp_path / "tasks.db") as connection:
        (table,) = (
            name
            for (name,) in connection.execute("select name from sqlite_master where type='table'")
            if "definition" in [c[1] for c in connection.execute(f"pragma table_info({name})")]
        )
        for id, (_, task) in zip(ids, tasks, strict=True):
            connection.execute(
                f"update {table} set definition=? where id=?", (json.dumps(task), id)
            )
    with watch():
        run_task(task_train, "theirs", url=url)
    assert manager.task_stat().get("waiting", 0) == 0


def test_result_in_a_pool_runs_nothing(watch, tmp_path):
    """The second phase of a task gets the result of the first one, which may be a stranger's."""
    result = {"_target_": "os.system", "_args_": [COMMAND]}
    manager = TaskManager("theirs", f"sqlite:///{tmp_path}/tasks.db")
    manager.create_task([{"number": 1}])
    manager.commit_task_res(manager.fetch_task(), result, status="part_done")
    with watch("in this process"):
        run_task(init_instance_by_config, "theirs", before_status="part_done", url=manager.url)
    (task,) = manager.query()
    assert (task["status"], "trusted" in task["error"]) == ("failed", True)
    manager.close()
    request = {
        "func": "qtorch.core.instantiate.init_instance_by_config",
        "definition": {"number": 1},
        "res": result,
        "options": {},
    }
    with watch("in a child"):
        outcome = serve_request(request, SimpleNamespace(send=lambda message: None))
    assert "trusted" in outcome["refused"]


def hostile_documents(folder: Path) -> list[tuple[str, str]]:
    """Documents of stored objects with hostile parts: file name and JSON text."""
    states = {"class": "x", "_target_": "x", "config": {}}
    documents = []
    for title, config in CONFIGS:
        name = config if isinstance(config, str) else "qtorch.model.LightningModel"
        head = {"qtorch": {"format": 1, "kind": "state"}}
        documents.append((title, json.dumps({**head, **states, "_target_": name})))
        for key in ("model", "dataset", "warm_start", "handler", "network"):
            for target in ("LightningModel", "DatasetH", "WarmStart"):
                package = {"DatasetH": "data", "WarmStart": "study"}.get(target, "model")
                body = {"_target_": f"qtorch.{package}.{target}", "config": {key: config}}
                documents.append((f"{title} as {key}", json.dumps({**head, **body})))
    return documents


def test_stored_objects_run_nothing(watch, tmp_path):
    documents = hostile_documents(tmp_path)
    assert len(documents) > 1000
    path = tmp_path / "params.pkl.json"
    with watch():
        for _, text in documents:
            path.write_text(text)
            with contextlib.suppress(Exception):
                read_object(path, "params.pkl")


@pytest.mark.parametrize("name", PICKLES)
def test_pickle_runs_nothing(watch, tmp_path, name):
    from qtorch.core.serial import Serializable
    from qtorch.data import DataHandlerLP, StaticDataLoader
    from qtorch.model import LightningModel

    path = tmp_path / "theirs.pkl"
    for data in (PICKLES[name], b"qtorch pickle 1\n" + PICKLES[name]):
        path.write_bytes(data)
        attempts = [
            lambda: read_object(path, "theirs.pkl"),
            lambda: Serializable.load(path),
            lambda: LightningModel.load(path),
            lambda: DataHandlerLP.load(path),
            lambda: init_instance_by_config(path),
            lambda: init_instance_by_config(f"file://{path}"),
            lambda: init_instance_by_config(as_stored_text(f"file://{path}")),
            lambda: StaticDataLoader(str(path)).load(),
            lambda: torch_file(path),
        ]
        for attempt in attempts:
            with watch(name), contextlib.suppress(Exception):
                attempt()


def torch_file(path: Path) -> None:
    """Read a file as a checkpoint and as an exported network."""
    from qtorch.model.loop.checkpoint import read_checkpoint

    with contextlib.suppress(Exception):
        read_checkpoint(path)
    load_network(path)


@pytest.mark.parametrize("name", NAMES)
def test_exported_network_runs_nothing(watch, tmp_path, name):
    from safetensors.torch import save_file

    path = tmp_path / "theirs.safetensors"
    for config in ({"_target_": name, "_args_": ["touch x"]}, name):
        metadata = {"qtorch": json.dumps({"network": config, "format": "safetensors"})}
        save_file({"w": torch.ones(1)}, path, metadata=metadata)
        with watch(name), contextlib.suppress(Exception):
            load_network(path)
