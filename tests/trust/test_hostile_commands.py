"""No command runs what the artifacts, checkpoints or plans of a stranger's runs name."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from hostile_things import COMMAND, PICKLES, hostile_configs

from qtorch import R
from qtorch.cli.jobs.stored_command import check_stored_words
from qtorch.cli.main import main
from qtorch.core.errors import TrustError
from qtorch.tracking.artifacts import object_files, write_object

CONFIGS = list(hostile_configs())
COMMANDS = {
    "predict": ("predict", "run={run}", "segment=test", "out=scores.csv"),
    "export": ("export", "run={run}", "format=safetensors", "out=network.safetensors"),
    "finetune": ("finetune", "run={run}", "max_epochs=1", "log_level=WARNING"),
    "report": ("report", "runs=[{run}]", "out=page"),
    "compare": ("report", "runs=[{run},{run}]", "out=pages"),
    "replay": ("replay", "run={run}"),
    "resume": ("train", "resume={run}", "log_level=WARNING"),
    "resume sweep": ("sweep", "resume", "theirs"),
    "show sweep": ("sweep", "show", "theirs"),
    "best of sweep": ("sweep", "best", "theirs"),
}
OBJECTS = ("task", "params.pkl", "dataset", "sweep", "environment", "fit_report", "pred.pkl")
# Words that Hydra itself acts on.
HOSTILE_WORDS = [
    "--config-dir=/tmp/theirs",
    "-cd",
    "--multirun",
    "hydra.searchpath=[file:///tmp/theirs]",
    "+hydra.callbacks.theirs._target_=os.system",
    "+hydra.callbacks.theirs={_target_: evil_module.Net}",
    "++hydra.callbacks.sweep_folder._target_=evil_module.Net",
    "hydra.launcher._target_=evil_module.Net",
    "hydra.launcher.setup=['touch x']",
    "+hydra.launcher.setup=['touch x']",
    "hydra.launcher.python=evil",
    "hydra.launcher.submitit_folder=/tmp/theirs",
    "hydra.launcher.address=10.0.0.1:6379",
    "hydra.launcher={partition: gpu, python: gpu}",
    "hydra.sweeper._target_=evil_module.Net",
    "hydra.sweeper.sampler={_target_: evil_module.Net}",
    "hydra.sweeper.sampler={_target_: optuna.samplers.TPESampler, x: {_target_: os.system}}",
    "hydra.sweeper.sampler._target_=os.system",
    "hydra/launcher=../../tmp/theirs",
    "hydra/launcher=/tmp/theirs",
    "+data@hydra.callbacks.theirs=synthetic",
    "+hydra.job.env_set.LD_PRELOAD=/tmp/theirs.so",
    "hydra.job.chdir=true",
    "hydra.run.dir=/etc",
    "hydra.sweep.dir=../../../etc",
    "hydra.output_subdir=/etc",
    "experiment=../../../tmp/theirs",
    "experiment=/tmp/theirs",
    "model=../theirs",
    "experiment=choice(a,../theirs)",
    "experiment_name=${oc.env:HOME}",
    "model.network._target_=${oc.env:HOME}",
    "seed=${now:%S}",
    "x=[${y}]",
    "not an override at all ][",
]
HARMLESS_WORDS = [
    "model=lstm,gru",
    "seed=0,1,2",
    "seed=range(1,4)",
    "model.network.hidden_size=8,16",
    "handler.label=['Ref($close,-2)/Ref($close,-1)-1']",
    "data.provider_uri=/data/bars",
    "+dataset.segments.extra=[2020-01-01,2020-06-30]",
    "~trainer.max_epochs",
    "hydra/launcher=joblib",
    "hydra/launcher=submitit_slurm",
    "hydra.launcher.n_jobs=4",
    "hydra.launcher.partition=gpu",
    "hydra.launcher.address=auto",
    "hydra/sweeper=optuna",
    "hydra.sweeper.n_trials=6",
    "hydra.sweeper.direction=maximize",
    "hydra.sweeper.pruner={_target_:optuna.pruners.MedianPruner,n_startup_trials:2}",
    "hydra.sweep.dir=out",
    "url=postgresql://host/db",
]


def find_run(name: str) -> Any:
    """The first run, of a single training, or the run of the sweep."""
    runs = sorted(R.list_recorders(experiment_name="debug").values(), key=lambda r: r.start_time)
    return runs[0] if name == "single" else next(r for r in runs if "qtorch.sweep" in r.list_tags())


def run_commands(folder: Path, watch: Any, title: str, names: Any = COMMANDS) -> set[str]:
    """Run commands on the runs of a store; they may fail, but not run the stranger's code.

    Return the names of those that failed.
    """
    uri = f"sqlite:///{folder}/mlruns/mlflow.db"
    run, failed_names = find_run("single"), set()
    for name in names:
        words = [w.format(run=run.id) for w in COMMANDS[name]]
        with watch(f"{title}: {name}"):
            if main([*words, f"tracking.uri={uri}"]):
                failed_names.add(name)
    return failed_names


def replace_object(run: Any, name: str, value: Any = None, data: bytes | None = None) -> None:
    """Put another object, or a pickle, in the place of an artifact."""
    root = Path(run.artifact_uri.removeprefix("file://"))
    for file in object_files(name):
        (root / file).unlink(missing_ok=True)
    if data is None:
        write_object(value, root, name)
    else:
        stem = name if name.endswith(".pkl") else f"{name}.object"
        (root / f"{stem}.pickle").write_bytes(b"qtorch pickle 1\n" + data)


@pytest.mark.slow
def test_commands_work_if_nothing_is_hostile(store, watch):
    assert run_commands(store, watch, "harmless") == {"resume"}  # of a finished run


@pytest.mark.slow
@pytest.mark.parametrize("kind", PICKLES)
def test_pickles_in_place_of_artifacts(store, watch, kind):
    for run in (find_run("single"), find_run("sweep")):
        for name in OBJECTS:
            replace_object(run, name, data=PICKLES[kind])
    readers = {"predict", "export", "finetune", "replay"}
    assert readers <= run_commands(store, watch, kind)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["task", "dataset", "params.pkl"])
def test_hostile_artifacts(store, watch, name):
    run = find_run("single")
    task = json.loads(json.dumps(run.load_object("task")))
    for title, config in random.Random(name).sample(CONFIGS, 3):
        if name == "task":
            part = random.Random(title).choice(["model", "dataset", "record", "reweighter"])
            replace_object(run, name, {**task, part: config})
        else:
            replace_object(run, name, config)
        run_commands(store, watch, title)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PICKLES)
def test_hostile_checkpoint(store, watch, kind):
    run = find_run("single")
    folder = Path(run.checkpoint_dir())
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("last.ckpt", "previous.ckpt", "best.ckpt"):
        (folder / name).write_bytes(PICKLES[kind])
    experiment = R.get_exp(experiment_name="debug")
    experiment.start(recorder_id=run.id, resume=True).end_run("KILLED")
    run_commands(store, watch, kind, ["resume"])
    if run.status != "FINISHED":
        experiment.start(recorder_id=run.id, resume=True).end_run("FINISHED")


def store_plan(run: Any, words: list[str], folder: Path) -> None:
    """Store a sweep's plan with these words."""
    plan = {
        "format": 1,
        "tracking_uri": run.uri,
        "folder": str(folder),
        "experiment": "debug",
        "commands": [{"words": words, "told": words}],
    }
    replace_object(run, "sweep", plan)


@pytest.mark.slow
@pytest.mark.parametrize(
    "word",
    [
        "model.network._target_=evil_module.Net",
        f"model.network={{_target_: os.system, command: '{COMMAND}'}}",
        "+model.loss=evil_module.go",
        "+model.callbacks=[evil_module.Net]",
        "+trainer.callbacks=[{_target_: evil_module.Net}]",
        "+trainer.plugins=[{_target_: evil_module.Net}]",
        "+trainer.profiler={_target_: evil_module.Net}",
        "handler.source._target_=evil_module.Net",
        "record=[{class: Net, module_path: evil_module.py}]",
        "+reweighter=evil_module.go",
        *HOSTILE_WORDS[::5],
    ],
)
def test_hostile_plan(store, watch, word):
    words = ["debug=tiny", "model=mlp", "log_level=WARNING", "sweep.isolate=false", "seed=5", word]
    folder = Path("theirs").absolute()
    folder.mkdir()
    for name in ("evil_module.py", "evil_package"):
        (shutil.copytree if Path(name).is_dir() else shutil.copy)(name, folder / name)
    store_plan(find_run("sweep"), words, folder)
    run_commands(store, watch, word, ["show sweep", "best of sweep", "resume sweep"])


@pytest.mark.parametrize("word", HOSTILE_WORDS)
def test_hostile_word_is_refused(word):
    reason = "options of the command line" if word.startswith("-") else ""
    with pytest.raises(TrustError, match=f"{reason}.*trusted=true"):
        check_stored_words(["seed=1", word])


@pytest.mark.parametrize("word", HARMLESS_WORDS)
def test_harmless_word_is_repeated(word):
    check_stored_words(["seed=1", word])
