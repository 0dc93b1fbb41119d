"""Public calls of qtorch against the signatures of real Qlib (a golden file of them).

Every call takes Qlib's arguments by their names and in their order, but for the differences that
are listed here with their reasons; docs/from-qlib.md has them as a table. `python
tests/core/test_qlib_signatures.py` writes it.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from qtorch.core.names import import_object
from qtorch.core.qlib.table import load_table

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "from-qlib.md"
BEGIN, END = "<!-- begin: calls that differ -->", "<!-- end: calls that differ -->"
GOLDEN = json.loads((ROOT / "tests" / "golden" / "qlib_signatures.json").read_text())
# Calls that the table of names does not map, or whose class is another one here.
OTHER_TARGETS = {
    "qlib.init": "qtorch.init",
    "qlib.utils.mod.init_instance_by_config": "qtorch.init_instance_by_config",
    "qlib.workflow.QlibRecorder": "qtorch.tracking.manager.Workflow",
    "qlib.workflow.recorder.Recorder": "qtorch.tracking.Recorder",
    "qlib.workflow.exp.Experiment": "qtorch.tracking.Experiment",
    "qlib.data.dataset.TSDataSampler": "qtorch.data.TSDataSampler",
}
PACKAGES = (
    *("qlib.backtest.", "qlib.data.dataset.", "qlib.model.", "qlib.workflow."),
    "qlib.contrib.data.handler.",
)
LOADERS = (
    *("qlib.data.dataset.loader.", "qlib.data.dataset.processor."),
    "qlib.data.dataset.handler.DataHandlerABC",
)

# (call, what differs) -> why
DIFFERENCES = {
    ("init", "default_conf"): "there is no data server",
    ("backtest", "pos_type"): "positions are limited by the cash",
    ("QlibRecorder", "exp_manager"): "`R` is the manager itself",
    ("Recorder", "name"): "the second argument is the store's URI, as in MLflowRecorder",
    ("TaskManager.insert_task", "missing"): "`insert_task_def` takes the definition",
    ("TrainerRM.train", "before_status"): "a delayed trainer has statuses of its own",
    ("TrainerRM.train", "after_status"): "a delayed trainer has statuses of its own",
    ("TrainerRM.train", "default_rec_name"): "it is an argument of the trainer",
    ("TrainerRM.end_train", "recs"): "it is called `models`, as in Trainer",
    ("DelayTrainerRM.end_train", "recs"): "it is called `models`, as in Trainer",
    ("DelayTrainerRM.worker", "end_train_func"): "it is called `train_func`, as in TrainerRM",
    ("DatasetH.config", "handler_kwargs"): "by name only",
    ("DataHandlerLP.config", "processor_kwargs"): "by name only",
    ("TSDatasetH", "step_len"): "after handler and segments, as in DatasetH",
    ("TSDatasetH", "flt_col"): "after handler and segments, as in DatasetH",
    ("DataHandler.setup_data", "enable_cache"): "the cache is an argument of the handler",
    ("TSDataSampler", "*"): "a dataset builds it: `TSDatasetH.prepare(segment)`",
    ("TSDataSampler.*", "missing"): "it indexes tensors",
    ("Exchange", "quote_cls"): "quotes are arrays",
    ("Exchange.*", "missing"): "a strategy asks its `Market` (`qtorch.backtest.StepContext`)",
    ("SignalRecord.generate_label", "missing"): "`generate` stores the labels",
    ("Alpha158.*", "missing"): "`qtorch.data.handler.alpha.alpha158` returns the columns",
    ("Dataset.*", "missing"): "a Dataset of your own defines them",
    ("MultiPassPortAnaRecord.random_init", "missing"): "the seed of the record draws the scores",
}


def pairs() -> Iterator[tuple[str, str]]:
    """Yield Qlib's names and ours: what the table maps, and the other targets."""
    yield from OTHER_TARGETS.items()
    for name, entry in load_table().items():
        is_public = name.startswith(PACKAGES) and not name.startswith(LOADERS)
        is_known = name in GOLDEN["classes"] or name in GOLDEN["functions"]
        if is_public and is_known and entry.same and entry.target is not None:
            yield name, entry.target


def find_differences() -> dict[tuple[str, str], str]:
    """Return every difference, and what it is."""
    differences = {}
    for name, target_name in pairs():
        target = import_object(target_name)
        title = name.rpartition(".")[2]
        if name in GOLDEN["functions"]:
            functions = {title: (GOLDEN["functions"][name], target)}
        else:
            functions = dict(list_methods(name, title, target))
        for call, (signature, function) in functions.items():
            if function is None:
                differences[call, "missing"] = "is not there"
                continue
            for argument, text in compare(signature["arguments"], function):
                differences[call, argument] = text
    return differences


def list_methods(name: str, title: str, cls: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield the constructor and the methods of a class of Qlib, with ours."""
    content = GOLDEN["classes"][name]
    yield title, (content, cls.__init__)
    for method, signature in content["methods"].items():
        yield f"{title}.{method}", (signature, getattr(cls, method, None))


def compare(
    arguments: Mapping[str, Any], function: Callable[..., Any]
) -> Iterator[tuple[str, str]]:
    """Yield the arguments of Qlib's that a function lacks, or takes at another place."""
    if not callable(function):
        return  # a property here
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD,)]
    takes_others = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for place, name in enumerate(arguments):
        if name not in {p.name for p in parameters}:
            if not takes_others:
                yield name, "is not taken"
        elif name not in positional:
            yield name, "is taken by name only"
        elif positional.index(name) != place:
            yield name, "is at another place"


def explain(key: tuple[str, str]) -> str | None:
    """Return the reason of a difference; None if it has none."""
    call, argument = key
    for reason_key in (key, (call, "*"), (f"{call.partition('.')[0]}.*", argument)):
        if reason_key in DIFFERENCES:
            return DIFFERENCES[reason_key]
    return None


def format_table() -> str:
    """Return the differences as a table of the page."""
    lines = ["| call of Qlib | difference | why |", "|---|---|---|"]
    rows = set()
    for key, text in find_differences().items():
        call, argument = key
        call, difference = f"`{call}`", text if argument == "missing" else f"`{argument}` {text}"
        wildcard = f"{key[0].partition('.')[0]}.*"
        if (wildcard, argument) in DIFFERENCES and key not in DIFFERENCES:
            call, difference = f"`{wildcard}`", "other methods are not there"
        rows.add(f"| {call} | {difference} | {explain(key)} |")
    return "\n".join([*lines, *sorted(rows)])


def test_every_difference_from_qlibs_calls_has_a_reason():
    differences = find_differences()
    assert not [(key, text) for key, text in differences.items() if explain(key) is None]


def test_no_reason_is_out_of_date():
    differences = find_differences()
    used = set()
    for call, argument in differences:
        used |= {(call, argument), (call, "*"), (f"{call.partition('.')[0]}.*", argument)}
    assert not set(DIFFERENCES) - used


def test_the_page_has_the_table_of_differences():
    text = PAGE.read_text()
    assert text.partition(BEGIN)[2].partition(END)[0].strip() == format_table()


def test_a_call_is_compared_by_names_and_places():
    def function(b: int, a: int, *, c: int) -> None: ...

    differences = dict(compare({"a": 1, "b": 2, "c": 3, "d": 4}, function))
    assert differences == {
        "a": "is at another place",
        "b": "is at another place",
        "c": "is taken by name only",
        "d": "is not taken",
    }


@pytest.mark.parametrize("name", ["task_train", "begin_task_train", "run_task", "task_generator"])
def test_functions_have_qlibs_signature(name):
    assert not [call for call, _ in find_differences() if call == name]


if __name__ == "__main__":
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{format_table()}\n{END}{rest.partition(END)[2]}")
