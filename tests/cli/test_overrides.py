"""Secrets stay out of the overrides that Hydra gets, and of the files that it writes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import hydra.core.utils
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from qtorch.cli.compose import compose_settings
from qtorch.cli.overrides import (
    expand_home,
    quote_value,
    redact_config,
    redact_output,
    redact_overrides,
    replace_config_writer,
    save_config,
)
from qtorch.core.errors import ConfigError
from qtorch.core.secrets import URLS_VARIABLE, complete_tree


@pytest.mark.parametrize(
    ("word", "redacted", "values"),
    [
        ("seed=1,2", "seed=1,2", [1, 2]),
        (
            "tracking.uri=http://me:s3cret@h:5000",
            "tracking.uri='http://me:***@h:5000'",
            ["http://me:s3cret@h:5000"],
        ),
        (
            "+url='http://me:s3{c,r}et@h/?a=b&c=d'",
            "+url='http://me:***@h/?a=b&c=d'",
            ["http://me:s3{c,r}et@h/?a=b&c=d"],
        ),
        (
            "url=http://me:s3{c,ret@h",  # Hydra could not parse it
            "url='http://me:***@h'",
            ["http://me:s3{c,ret@h"],
        ),
        (
            r"url='http://me:it\'s3cret@h'",
            "url='http://me:***@h'",
            ["http://me:it's3cret@h"],
        ),
        (
            "url=http://me:s3cret@h1,http://me:s3crets@h2",
            "url=http://me:***@h1,http://me:***@h2",
            ["http://me:s3cret@h1", "http://me:s3crets@h2"],
        ),
        (
            "a={b:['http://s3cret@h',1]}",
            "a={b:['http://***@h',1]}",
            [{"b": ["http://s3cret@h", 1]}],
        ),
    ],
)
def test_overrides(word, redacted, values):
    with redact_overrides(["-m", word]) as words:
        assert words == ["-m", redacted]
        override = OverridesParser.create().parse_override(redacted)
        if override.is_sweep_override():
            parser = OverridesParser.create()
            texts = [f"{override.key_or_group}={t}" for t in override.sweep_string_iterator()]
            parsed_values = [parser.parse_override(t).value() for t in texts]
        else:
            parsed_values = [override.value()]
        assert complete_tree(parsed_values) == values
        assert ("s3c" in os.environ.get(URLS_VARIABLE, "")) == ("s3c" in word)
    assert URLS_VARIABLE not in os.environ


@pytest.mark.parametrize(
    ("word", "expanded"),
    [
        ("data.path=~/bars", "data.path=H/bars"),
        ("data.path=~", "data.path=H"),
        ("data.path=~/a,~/b", "data.path=H/a,H/b"),
        ("data.provider_uri={day: ~/a,1min:~/b}", "data.provider_uri={day: H/a,1min:H/b}"),
        ("x=[~/a, ~/b]", "x=[H/a, H/b]"),
        ("tracking.uri=sqlite:///~/a.db", "tracking.uri=sqlite:///H/a.db"),
        ("~callbacks", "~callbacks"),
        ("~a.b=~/x", "~a.b=H/x"),
        ("--config-dir=~/c", "--config-dir=H/c"),
        ("x=a~/b", "x=a~/b"),
        ("run_name='a ~ b'", "run_name='a ~ b'"),
    ],
)
def test_home_folder(word, expanded, monkeypatch):
    home = "/me/a b (c)"
    monkeypatch.setenv("HOME", home)
    escaped = home if word.startswith("-") else home.replace("(", r"\(").replace(")", r"\)")
    assert expand_home([word]) == [expanded.replace("H", escaped)]
    if word == "data.path=~/bars":
        (override,) = OverridesParser.create().parse_overrides(expand_home([word]))
        assert override.value() == f"{home}/bars"


@pytest.mark.parametrize("text", ["a", "it's", 'x"y', "a\\'b", "sqlite:///C:\\", "http://h/?a=b"])
def test_quoted_value_is_parsed_as_the_text(text):
    assert OverridesParser.create().parse_override(f"a={quote_value(text)}").value() == text


def test_configuration_of_a_sweep(monkeypatch):
    monkeypatch.setenv(URLS_VARIABLE, "[]")
    monkeypatch.setenv("PW", "s3cret")
    source = {
        "tracking": {"uri": "http://me:s3cret@h"},
        "same": "${tracking.uri}",
        "whole": "${tracking}",
        "built": "http://me:${oc.env:PW}@h/x",
        "list": ["http://s3cret@h", 1, None],
        "missing": "???",
        "unknown": "${oc.env:NO_SUCH_VARIABLE}",
    }
    config = OmegaConf.create(source)
    OmegaConf.set_readonly(config, True)
    redact_config(config)
    assert OmegaConf.to_container(config, resolve=False) == {
        **source,
        "tracking": {"uri": "http://me:***@h"},
        "built": "http://me:***@h/x",
        "list": ["http://***@h", 1, None],
    }
    urls = ["http://me:s3cret@h", "http://me:s3cret@h/x", "http://s3cret@h"]
    assert json.loads(os.environ[URLS_VARIABLE]) == urls


def test_saved_configuration(tmp_path):
    replace_config_writer()
    assert hydra.core.utils._save_config is save_config
    plain = {"a": [1, None, "x: y", "${b.c}"], "b": {"c": "it's", "d": "???", "e": 1e-3}}
    save_config(OmegaConf.create(plain), "config.yaml", tmp_path / ".hydra")
    path = Path(tmp_path, ".hydra", "config.yaml")
    assert path.read_text() == OmegaConf.to_yaml(OmegaConf.create(plain))
    assert path.stat().st_mode & 0o777 == 0o600
    secret = {
        "password": "hunter2",
        "uri": 'http://me:"s3\'cret"@h',
        "list": ["tracking.uri=http://s3cret@h"],
    }
    save_config(OmegaConf.create(secret), "config.yaml", tmp_path / ".hydra")
    stored_config = OmegaConf.to_container(OmegaConf.load(path))
    assert stored_config == {
        "password": "***",
        "uri": "http://me:***@h",
        "list": ["tracking.uri=http://***@h"],
    }


def test_configuration_on_the_screen(capsys):
    for words, text in ((["--cfg", "job"], "***"), (["seed=1"], "s3cret")):
        with redact_output(words):
            print("uri: http://me:s3cret@h")
        assert capsys.readouterr().out == f"uri: http://me:{text}@h\n"


# -- settings of a class that is replaced --------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["+model.network={_target_: torch.nn.Linear, in_features: 3}"], {"in_features": 3}),
        (
            ["model.network._target_=torch.nn.Linear", "+model.network.in_features=3"],
            {"in_features": 3},
        ),
        (["model.network={_target_: torch.nn.Linear, num_layers: 3}"], {"num_layers": 3}),
        (["model.network._target_=qtorch.nn.GRU"], {"hidden_size": 64, "num_layers": 2}),
        (["model.network={_target_: no_such_module.Net}"], {"hidden_size": 64, "num_layers": 2}),
        (["model.network.hidden_size=3"], {"hidden_size": 3, "num_layers": 2}),
    ],
)
def test_settings_that_a_new_class_does_not_take_are_left_out(overrides, expected, capsys):
    network = compose_settings("train", overrides)["task"]["model"]["network"]
    del network["_target_"]
    network.pop("dropout", None)
    assert network == expected
    is_replaced = "torch" in overrides[0].replace("qtorch", "")
    assert ("model.network: left out hidden_size" in capsys.readouterr().err) == is_replaced


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+lr=0.1", "unknown option 'lr'. Did you mean model.optimizer.lr?"),
        ("+modl=gru", "unknown option 'modl'. Did you mean 'model'?"),
        ("+modl.lr=3", "unknown option 'modl'. Did you mean 'model'?"),
        ("+callbacks.early_stopp=3", "unknown option of callbacks 'early_stopp'. Did you mean"),
        ("+sweep.retri=true", "unknown option of sweep 'retri'. Did you mean 'retry'?"),
        ("+trainer.max_epoch=3 +h=1", "unknown option 'h'"),
        ("log_level=info", "unknown log_level 'info'. Did you mean 'INFO'?"),
        ("experiment_name=", "experiment_name is ''; expected text"),
        ("experiment_name=5", "experiment_name is 5; expected text (in quotes: 'experiment"),
        ("run_name=[a]", "run_name is ['a']; expected text"),
        ("sweep.retry=maybe", "sweep.retry is 'maybe'; expected true or false"),
        ("fleet.max_members=0", "fleet.max_members is 0; expected a whole number of at least 1"),
        ("runner=fleat", "unknown runner 'fleat'. Did you mean 'fleet'?"),
        ("task=5", "task is 5; expected a mapping"),
        ("epochs=3", "unknown option 'epochs'. Did you mean trainer.max_epochs?"),
        ("batch_size=3", "unknown option 'batch_size'. Did you mean model.batch.size?"),
        ("data.path=bars.csv", "It is an option of data=table."),
        ("data.provider_uri=bars", "It is an option of data=qlib"),
    ],
)
def test_settings_of_the_command_that_mean_nothing(override, message):
    with pytest.raises(ConfigError) as error:
        compose_settings("train", override.split())
    assert message in str(error.value)


@pytest.mark.parametrize("record", ["signal", "full"])
def test_settings_of_a_portfolio_need_the_record_that_makes_it(record, caplog):
    compose_settings("train", ["debug=tiny", f"record={record}", "portfolio.topk=5"])
    text = "portfolio.topk changes nothing: add record=full"
    assert (text in caplog.text) == (record == "signal")


@pytest.mark.parametrize(
    "overrides",
    [
        ["+h=32", "model.network.hidden_size=${h}"],
        ["+sizes.h=32", "model.network.hidden_size=${sizes.h}"],
        ["+sizes.h=32", "run_name='${experiment_name} of ${.sizes.h}'"],
        ["+callbacks.early_stop.min_delta=0.1", "+trainer.limit_train_batches=2"],
        ["+task.note=mine", "++seed=3", "+handler.cache=false"],
    ],
)
def test_new_settings_that_are_read(overrides):
    compose_settings("train", overrides)


def test_arguments_of_a_source_that_is_replaced():
    words = ["data._target_=qtorch.data.QlibSource", "+data.provider_uri=bars"]
    data = compose_settings("train", words)["task"]["dataset"]["handler"]["source"]
    assert data == {"_target_": "qtorch.data.QlibSource", "provider_uri": "bars"}
