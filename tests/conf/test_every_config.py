"""Tests that every YAML file of conf/ can be composed and that its objects can be built."""

from __future__ import annotations

from pathlib import Path

import pytest
from model_libraries import require_model_library
from pytorch_lightning.strategies import ModelParallelStrategy

from qtorch import R
from qtorch.cli.compose import compose_settings, config_path
from qtorch.core.errors import TrackingError
from qtorch.core.instantiate import init_instance_by_config
from qtorch.core.names import import_path
from qtorch.model.loop.options import build_early_stopping, check_monitor, trainer_options
from qtorch.model.loop.rank_group import RankEnvironment, RankInfo

CONF = config_path()
ROOTS = ("bars", "export", "finetune", "predict", "probe", "report", "rolling", "run", "train")
FILES = sorted(p.relative_to(CONF).with_suffix("").as_posix() for p in CONF.rglob("*.yaml"))
CHOICES = [f for f in FILES if "/" in f and not f.startswith("hydra/")]
# Overrides that a config needs before it can be built.
REQUIRED_OVERRIDES = {
    "data/qlib": ["data.provider_uri=bars"],
    "data/table": ["data.path=bars.parquet"],
    "model/lightning": ["+model.network._target_=qtorch.nn.GRU"],
    "experiment/nyse500": ["data.provider_uri=bars", "universe=stocks"],
    "tracking/server": ["tracking.uri=http://127.0.0.1:9"],
}


def compose_choice(choice: str, *overrides: str) -> dict:
    group, option = choice.rsplit("/", 1)
    data_overrides = [] if group in ("data", "experiment", "debug") else ["data=synthetic_tiny"]
    return compose_settings(
        "train",
        [f"{group}={option}", *data_overrides, *REQUIRED_OVERRIDES.get(choice, []), *overrides],
    )


@pytest.fixture(scope="module")
def bars(tmp_path_factory) -> Path:
    """The tiny market as a Qlib folder and as a table."""
    from qtorch.data.source.writer import write_qlib

    folder = tmp_path_factory.mktemp("bars")
    source = init_instance_by_config(compose_settings("bars", ["data=synthetic_tiny"])["data"])
    write_qlib(source, folder / "bars")
    source.load().to_frame().reset_index().to_parquet(folder / "bars.parquet", index=False)
    return folder


def test_every_root_config_belongs_to_a_command():
    assert {f for f in FILES if "/" not in f} == set(ROOTS)
    assert CHOICES


@pytest.mark.parametrize(("devices", "num_shards"), [("[0,2,3]", 6), ("-1", 2)])
def test_fsdp_shards_over_all_devices_of_all_nodes(monkeypatch, devices, num_shards):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    overrides = [f"trainer.devices={devices}", "trainer.num_nodes=2"]
    trainer = compose_choice("trainer/fsdp", *overrides)["task"]["model"]["trainer"]
    size = trainer_options(trainer, ()).num_devices
    assert size == num_shards
    strategy = init_instance_by_config(trainer["strategy"])
    strategy.cluster_environment = RankEnvironment(RankInfo(0, size, 0, 0, "127.0.0.1", 1))
    monkeypatch.setattr(ModelParallelStrategy, "setup_environment", lambda self: None)
    strategy.setup_environment()  # everything except the rendezvous of the ranks
    assert strategy._data_parallel_size == size


def is_slow(choice: str) -> bool:
    """Tell if the fast suite does without a choice: it has a few files of the main groups."""
    return choice not in (
        *("data/synthetic", "data/qlib", "dataset/ts", "dataset/day", "handler/alpha158_20"),
        *("model/lstm", "model/linear", "model/optimizer/adamw", "experiment/nyse500"),
    )


@pytest.mark.parametrize(
    "choice", [pytest.param(c, marks=[pytest.mark.slow] * is_slow(c)) for c in CHOICES]
)
def test_config_composes_and_builds(choice, bars, monkeypatch):
    require_model_library(choice.removeprefix("model/"))
    monkeypatch.chdir(bars)
    settings = compose_choice(choice)
    assert set(settings["task"]) == {"model", "dataset", "record", "reweighter", "seed"}
    text = (CONF / f"{choice}.yaml").read_text()
    assert choice.startswith("model/optimizer/") or text.startswith("#")
    assert len(text.splitlines()) < 40
    source = init_instance_by_config(settings["data"])
    if choice.startswith("data/"):
        assert settings["universe"] in source.universes()
        assert len(source.calendar()) > 100
    shares = [s for s in settings["segments"].values() if not isinstance(s, list)]
    first, middle, last = "2018-07-02", "2019-06-28", "2020-06-30"
    dates = {"train": [first, middle], "test": ["2019-07-01", last]} if shares else {}
    dataset_config = settings["dataset"]
    dataset_config = {**dataset_config, "segments": dates or dataset_config["segments"]}
    assert init_instance_by_config(dataset_config).handler is not None
    model = init_instance_by_config(settings["model"])
    if hasattr(model, "monitor"):
        check_monitor(build_early_stopping(model.early_stop, model.monitor)[1])
    for record in settings["record"] or ():
        init_instance_by_config(record, try_kwargs={"recorder": None})


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


# Both commands have the same groups (`test_rolling_has_the_config_groups_of_train`).
@pytest.mark.slow
@pytest.mark.parametrize("dataset", options("dataset"))
@pytest.mark.parametrize(
    ("root", "debug"),
    [("rolling", "tiny"), *(("train", debug) for debug in (None, *options("debug")))],
)
def test_debug_options_fit_every_dataset_and_handler(debug, dataset, root):
    fixed = [f"dataset={dataset}", *([] if debug == "tiny" else ["data=synthetic_tiny"])]
    fixed += [] if debug is None else [f"debug={debug}"]
    choices = [f"handler={handler}" for handler in options("handler")]
    for choice in [*choices, "experiment=alpha360_gru", "experiment=master"]:
        if choice == "experiment=master" and dataset != "ts":
            continue  # it sets the length of its windows
        settings = compose_settings(root, [choice, *fixed])
        dates = {"train": ["2018-07-02", "2019-06-28"], "test": ["2019-07-01", "2020-06-30"]}
        config = {**settings["task"]["dataset"], "segments": dates}
        built = init_instance_by_config(config)
        assert config["handler"]["_target_"] == import_path(type(built.handler))
        if dataset == "ts":
            expected = 5 if debug == "tiny" else 8 if choice == "experiment=master" else 20
            assert built.step_len == expected


@pytest.mark.parametrize("choice", [c for c in CHOICES if c.startswith("tracking/")])
def test_tracking_config_selects_the_store(choice, bars, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QTORCH_TRACKING_TIMEOUT", "1")
    uri = compose_choice(choice)["tracking"]["uri"]
    if uri is None:
        assert R.get_uri().startswith(f"sqlite:///{tmp_path}")
    else:
        with R.uri_context(uri), pytest.raises(TrackingError, match=r"127\.0\.0\.1:9 does not"):
            R.list_experiments()


def test_default_config_is_qlibs_lstm_benchmark():
    """The values are those of Qlib's LSTM benchmark on Alpha158 (YAML file of version 0.9.7)."""
    settings = compose_settings("train", [])
    handler, dataset, network = (
        settings["handler"],
        settings["dataset"],
        settings["model"]["network"],
    )
    names = [p["_target_"].rsplit(".", 1)[1] for p in handler["infer_processors"]]
    assert names == ["FilterCol", "RobustZScoreNorm", "Fillna"]
    assert len(handler["infer_processors"][0]["col_list"]) == 20
    assert [p["_target_"].rsplit(".", 1)[1] for p in handler["learn_processors"]] == [
        "DropnaLabel",
        "CSRankNorm",
    ]
    assert dataset["step_len"] == 20
    assert (network["hidden_size"], network["num_layers"], network["dropout"]) == (64, 2, 0.0)


def test_rolling_has_the_config_groups_of_train():
    settings, train = (
        compose_settings("rolling", ["data=synthetic_tiny"]),
        compose_settings("train", []),
    )
    assert settings["task"].keys() == train["task"].keys()
    assert settings["handler"] == train["handler"] | {"source": settings["data"]}


def test_mapping_options_accept_new_keys():
    """With an empty mapping as default, OmegaConf would reject every key that a user adds."""
    invalid_files = [f for f in FILES if ": {}" in (CONF / f"{f}.yaml").read_text()]
    assert not invalid_files
    table = compose_settings("bars", ["data=table", "data.path=x", "data.columns={close:last}"])
    assert table["data"]["columns"] == {"close": "last"}
    finetune_settings = compose_settings("finetune", ["run=x", "trainer={gradient_clip_val:1.0}"])
    assert finetune_settings["trainer"] == {"gradient_clip_val": 1.0}
