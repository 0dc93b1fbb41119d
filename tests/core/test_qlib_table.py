"""The table of Qlib's names against the signatures of real Qlib (a golden file of them)."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from qtorch.core.errors import ArgumentError, ConfigError
from qtorch.core.names import import_object
from qtorch.core.qlib.rules import RULES
from qtorch.core.qlib.table import (
    RULE_KINDS,
    Entry,
    find_entry,
    load_imports,
    load_table,
    model_arguments,
    rule_targets,
)
from qtorch.core.qlib.translation import translate_config

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "qlib_signatures.json"
MAPPED = {name: entry for name, entry in load_table().items() if entry.refused is None}
FILLED_IN = ("d_feat", "num_outputs")  # arguments that follow from the data


@cache
def golden() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(GOLDEN.read_text())
    return document


def parameters(target: Any) -> dict[str, inspect.Parameter]:
    function = target.__init__ if isinstance(target, type) else target
    return dict(inspect.signature(function).parameters)


def test_every_class_of_qlib_is_mapped_or_refused_by_name():
    names = set(load_table())
    assert set(golden()["classes"]) - names == set()
    functions = set(golden()["functions"]) | {"tft.TFTModel", "qlib.workflow.R"}
    modules = ("qlib.utils.", "qlib.constant.", "qlib.config.", "qlib.log.", "qlib.tests.")
    functions |= {"qlib.auto_init", "qlib.get_project_path", "qlib.get_module_logger"}
    functions |= {"qlib.data.D", "qlib.data.data.D"}
    unknown = names - set(golden()["classes"]) - functions
    assert not [name for name in unknown if not name.startswith(modules)]
    assert all(len(entry.refused) > 20 for entry in load_table().values() if entry.refused)


def test_every_argument_of_qlib_has_a_rule():
    faults = [(name, fault) for name in MAPPED for fault in argument_faults(name)]
    assert not faults


def argument_faults(name: str) -> list[str]:
    """The arguments of Qlib's class without a rule, and rules without an argument."""
    entry = MAPPED[name]
    signature = golden()["classes"].get(name) or golden()["functions"].get(name)
    if signature is None:
        return []
    unhandled = set(signature["arguments"]) - set(entry.arguments)
    unknown: set[str] = set()
    if entry.same:
        own_parameters = parameters(import_object(str(entry.target)))
        takes_others = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own_parameters.values())
        unhandled = set() if takes_others else unhandled - set(own_parameters)
    elif not signature["others"]:
        unknown = set(entry.arguments) - set(signature["arguments"])
    if entry.ignores_others and not signature["others"]:
        unknown.add("ignores_others")
    unknown |= set(entry.defaults) - set(signature["arguments"]) - set(entry.arguments)
    return sorted(unhandled | unknown)


PARAMETERS = {"argument", "values", "lower", "factor", "unless", "allowed", "backtest", "columns",
              "default", "flat", "flat_input", "names", "target"}  # fmt: skip


def test_every_rule_has_one_known_kind():
    def check(rule: Any) -> None:
        if isinstance(rule, str):
            return
        kinds = [kind for kind in RULE_KINDS if kind in rule]
        assert len(kinds) == 1, rule
        assert set(rule) - set(kinds) <= PARAMETERS, rule
        if "rule" in rule:
            assert rule["rule"] in RULES
        for part in rule.get("inside", {}).values():
            check(part)

    for entry in MAPPED.values():
        for rule in entry.arguments.values():
            check(rule)


def test_the_paths_of_a_model_exist_here_and_its_defaults_are_qlibs():
    names = [name for name, entry in MAPPED.items() if "network" in entry.settings]
    assert len(names) > 20
    assert not [(name, fault) for name in names for fault in path_faults(name)]
    assert not [(name, fault) for name in names for fault in network_default_faults(name)]


def path_faults(name: str) -> list[str]:
    """The paths of a model's rules that its network, training step or model does not take."""
    entry = MAPPED[name]
    module = entry.settings.get("module", {}).get("_target_")
    parts = {
        "": set(parameters(import_object(str(entry.target)))),
        "network": set(parameters(import_object(entry.settings["network"]["_target_"]))),
        "module": set(parameters(import_object(module))) if module else set(),
    }
    faults = []
    for path in rule_targets(entry):
        first, _, rest = path.partition(".")
        is_known = first in parts[""] and (first not in parts or rest in parts[first])
        faults += [] if is_known else [path]
    return faults


def network_default_faults(name: str) -> list[str]:
    """The arguments whose default is not Qlib's."""
    entry, qlib_defaults = MAPPED[name], golden()["classes"][name]["arguments"]
    faults = [a for a, value in entry.defaults.items() if qlib_defaults[a] != value]
    network = entry.settings["network"]
    own_parameters = parameters(import_object(network["_target_"]))
    for argument, rule in entry.arguments.items():
        key = rule.removeprefix("network.") if isinstance(rule, str) else ""
        if key in own_parameters and key not in FILLED_IN and argument in qlib_defaults:
            default = entry.defaults.get(argument, network.get(key, own_parameters[key].default))
            faults += [argument] if qlib_defaults[argument] != default else []
    return faults


def test_defaults_of_classes_with_the_same_arguments_are_qlibs():
    faults = []
    for name, entry in MAPPED.items():
        signature = golden()["classes"].get(name) or golden()["functions"].get(name)
        if signature is None:
            continue
        own_parameters = parameters(import_object(str(entry.target))) if entry.same else {}
        for argument, default in signature["arguments"].items():
            if argument in own_parameters and argument not in (
                *entry.arguments,
                *FILLED_IN,
                "init_data",
            ):
                value = entry.defaults.get(argument, own_parameters[argument].default)
                if not is_same_default(default, value):
                    faults.append((name, argument, default, value))
    assert not faults


def is_same_default(qlib: Any, value: Any) -> bool:
    """Whether two defaults mean the same: an object's text, an empty list, a required argument."""
    if qlib == "<required>" or (isinstance(qlib, str) and qlib.startswith("<")):
        return True
    if value is None and qlib in ({}, [], "day"):
        return True  # the frequency of a source is "day" if it has daily bars
    if isinstance(value, list | tuple) and isinstance(qlib, list):
        return len(value) == len(qlib)
    return bool(qlib == value)


def test_a_package_of_qlib_exports_the_classes_of_its_modules():
    entry = find_entry("qlib.contrib.model.LSTM")
    assert isinstance(entry, Entry)
    assert entry.name == "qlib.contrib.model.pytorch_lstm.LSTM"
    strategy = find_entry("qlib.contrib.strategy.TopkDropoutStrategy")
    assert strategy is not None
    assert strategy.target == "qtorch.backtest.TopkDropoutStrategy"
    assert find_entry("qlib.contrib.model.Nothing") is None
    assert "n_jobs" in model_arguments()


def test_a_class_is_found_in_the_modules_that_import_it():
    entry = find_entry(
        "qlib.contrib.data.handler.DataHandlerLP"
    )  # the path of RD-Agent's templates
    assert entry is not None
    assert entry.target == "qtorch.data.DataHandlerLP"
    assert set(load_imports().values()) <= set(load_table())
    assert not set(load_imports()) & set(load_table())


@pytest.mark.parametrize(
    ("config", "error", "text"),
    [
        ({"class": "Lstm", "module_path": "qlib.contrib.model"}, ConfigError, "pytorch_lstm"),
        ({"class": "tft.TFTModel"}, ConfigError, "TensorFlow"),
        (
            {"class": "NestedExecutor", "module_path": "qlib.backtest.executor"},
            ConfigError,
            "no nested execution",
        ),
        (
            {"class": "qlib.contrib.model.pytorch_gru.GRU", "kwargs": {"n_epoch": 1}},
            ArgumentError,
            "Did you mean 'n_epochs'",
        ),
        (
            {"class": "qlib.contrib.model.pytorch_gru.GRU", "kwargs": {"optimizer": "lion"}},
            ConfigError,
            "optimizer",
        ),
        (
            {"class": "qlib.contrib.model.pytorch_tabnet.TabnetModel", "kwargs": {"n_jobs": 3}},
            ArgumentError,
            "n_jobs",
        ),
        ({"class": "qlib.contrib.model.pytorch_gru.GRU", "kwargs": 3}, ConfigError, "mapping"),
    ],
)
def test_a_name_that_is_nothing_here_is_explained(config, error, text):
    with pytest.raises(error, match=text):
        translate_config(config)


@pytest.mark.qlib
def test_the_golden_signatures_are_those_of_real_qlib(tmp_path):
    file = tmp_path / "signatures.json"
    script = ROOT / "scripts" / "parity" / "qlib_signatures.py"
    subprocess.run([os.environ["QTORCH_QLIB_PYTHON"], script, file], check=True, cwd=tmp_path)
    assert json.loads(file.read_text()) == golden()


@pytest.mark.qlib
def test_the_imports_of_the_table_are_those_of_real_qlib():
    program = """
import importlib, json, sys
for name, source in json.load(sys.stdin).items():
    module, _, title = name.rpartition(".")
    value = getattr(importlib.import_module(module), title)
    if f"{value.__module__}.{title}" != source:
        print("wrong:", name)
"""
    result = subprocess.run(
        [os.environ["QTORCH_QLIB_PYTHON"], "-c", program],
        input=json.dumps(load_imports()),
        check=True,
        capture_output=True,
        text=True,
    )
    assert not [line for line in result.stdout.splitlines() if line.startswith("wrong:")]
