"""Public calls of qtorch against the signatures of real Qlib (a golden file of them).

Every call takes Qlib's arguments by their names and in their order, but for the differences that
are listed here with their reasons; docs/from-qlib.md has them as a table. `python
tests/core/test_qlib_signatures.py` writes it.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from qtorch.core.names import import_object
from qtorch.core.qlib.table import load_table

pytestmark = pytest.mark.xdist_group("qlib_signatures")  # so that one process compares them

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "from-qlib.md"
BEGIN, END = "<!-- begin: calls that differ -->", "<!-- end: calls that differ -->"
GOLDEN = json.loads((ROOT / "tests" / "golden" / "qlib_signatures.json").read_text())
# Calls that the table of names does not map, or whose class is another one here.
OTHER_TARGETS = {
    "qlib.init": "qtorch.init",
    "qlib.utils.mod.init_instance_by_config": "qtorch.init_instance_by_config",
    "qlib.data.dataset.TSDataSampler": "qtorch.data.TSDataSampler",
}
PACKAGES = (
    *("qlib.backtest.", "qlib.data.dataset.", "qlib.model.", "qlib.workflow."),
    *("qlib.contrib.data.handler.", "qlib.contrib.evaluate.", "qlib.contrib.eva."),
    *("qlib.contrib.report.", "qlib.contrib.workflow."),
)
# Packages all of whose functions are mapped or refused by name.
WHOLE_PACKAGES = (
    *("qlib.backtest.", "qlib.data.dataset.", "qlib.model.", "qlib.workflow."),
    *("qlib.contrib.report.", "qlib.contrib.eva", "qlib.contrib.data.handler."),
)
LOADERS = (
    *("qlib.data.dataset.loader.", "qlib.data.dataset.processor."),
    "qlib.data.dataset.handler.DataHandlerABC",
)

# Members that are not there: (class, names, why).
MISSING = (
    ("Exchange", "deal_order get_order_helper", "a backtest executes orders"),
    (
        "Exchange",
        "LT_FLT LT_NONE LT_TP_EXP all_fields buy_price buy_vol_limit get_quote_from_qlib "
        "limit_type logger quote quote_cls sell_price sell_vol_limit",
        "quotes are arrays: `Exchange.quotes`",
    ),
    (
        "Position",
        "add_count_all fill_stock_value settle_commit settle_start update_order "
        "update_stock_count update_stock_price update_stock_weight update_weight_all",
        "positions are for reading: a backtest changes its own arrays",
    ),
    (
        "PortAnaRecord",
        "all_freq backtest_config executor_config indicator_analysis_freq risk_analysis_freq "
        "strategy_config",
        "they are `backtest`, `executor`, `strategy`, `risk_freqs` and `indicator_freqs`",
    ),
    ("MultiPassPortAnaRecord", "original_strategy", "the strategy is `strategy`"),
    ("MultiPassPortAnaRecord", "random_init", "the seed of the record draws the scores"),
    (
        "TSDataSampler",
        "build_index data data_arr flt_data flt_idx_map idx_arr idx_df idx_map idx_map2arr "
        "nan_idx slice_idx_map_and_data_index",
        "it indexes tensors",
    ),
    ("TaskManager", "ENCODE_FIELDS_PREFIX logger", "tasks are JSON; the log has one logger"),
    ("Dataset", "prepare setup_data", "a Dataset of your own defines them"),
    (
        "Alpha158",
        "get_feature_config",
        "`qtorch.data.handler.alpha.alpha158` returns the columns",
    ),
    ("SignalRecord", "generate_label", "`generate` stores the labels"),
    ("DataHandlerLP", "ATTR_MAP", "the views are not frames that are attributes"),
    ("MultiHorizonGenBase", "ta", "horizons need no calendar"),
    ("MLflowRecorder", "async_log", "logging is always asynchronous"),
    ("Collector", "pickle_backend", "collectors are not pickled"),
)
# (call, what differs) -> why
DIFFERENCES = {
    ("init", "default_conf"): "there is no data server",
    ("QlibRecorder", "exp_manager"): "`R` is the manager itself",
    ("Recorder", "name"): "the second argument is the store's URI, as in MLflowRecorder",
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
    ("Exchange", "quote_cls"): "quotes are arrays",
    **{(f"{c}.{n}", "missing"): reason for c, names, reason in MISSING for n in names.split()},
}


def pairs() -> Iterator[tuple[str, str]]:
    """Yield Qlib's names and ours: what the table maps, and the other targets."""
    yield from OTHER_TARGETS.items()
    for name, entry in load_table().items():
        is_public = name.startswith(PACKAGES) and not name.startswith(LOADERS)
        is_known = name in GOLDEN["classes"] or name in GOLDEN["functions"]
        if is_public and is_known and entry.same and entry.target is not None:
            yield name, entry.target


@cache
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
        if name in GOLDEN["classes"]:
            missing = set(GOLDEN["classes"][name]["members"]) - member_names(target)
            differences |= {(f"{title}.{m}", "missing"): "is not there" for m in missing}
    return differences


def member_names(cls: type) -> set[str]:
    """Return the members of a class of ours: also those that a method sets."""
    names = set(dir(cls))
    for base in cls.__mro__:
        if base.__module__.startswith("qtorch."):
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
            names |= {
                node.attr
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and getattr(node.value, "id", "") == "self"
            }
            names |= {
                node.target.id
                for node in ast.walk(tree)
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
            }
    return names


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
    return DIFFERENCES.get(key) or DIFFERENCES.get((key[0], "*"))


def format_table() -> str:
    """Return the differences as a table of the page; members with one reason share a row."""
    lines = ["| call of Qlib | difference | why |", "|---|---|---|"]
    rows: dict[tuple[str, str, str | None], list[str]] = {}
    for key, text in sorted(find_differences().items()):
        call, argument = key
        if argument == "missing":
            owner, _, member = call.partition(".")
            rows.setdefault((owner, text, explain(key)), []).append(member)
        else:
            rows[call, f"`{argument}` {text}", explain(key)] = []
    for (owner, text, reason), members in sorted(rows.items(), key=str):
        names = f"`{owner}`: " + ", ".join(f"`{m}`" for m in members)
        call = names if len(members) > 1 else f"`{'.'.join([owner, *members])}`"
        difference = text.replace("is not", "are not") if len(members) > 1 else text
        lines.append(f"| {call} | {difference} | {reason} |")
    return "\n".join(lines)


def test_every_difference_from_qlibs_calls_has_a_reason():
    differences = find_differences()
    assert not [(key, text) for key, text in differences.items() if explain(key) is None]


def test_no_reason_is_out_of_date():
    differences = find_differences()
    used = set()
    for call, argument in differences:
        used |= {(call, argument), (call, "*")}
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


def test_every_function_of_the_subsystem_is_mapped_or_refused_by_name():
    functions = [name for name in GOLDEN["functions"] if name.startswith(WHOLE_PACKAGES)]
    assert len(functions) > 50
    assert not set(functions) - set(load_table())


def test_members_are_compared_too():
    members = {name for entry in GOLDEN["classes"].values() for name in entry["members"]}
    assert {"STATUS_FI", "active_recorder", "artifact_uri", "client", "default_uri"} <= members
    own_names = member_names(import_object("qtorch.tracking.Recorder"))
    assert {"STATUS_FI", "artifact_uri", "client"} <= own_names
    assert "async_log" not in own_names


@pytest.mark.parametrize("name", ["task_train", "begin_task_train", "run_task", "task_generator"])
def test_functions_have_qlibs_signature(name):
    assert not [call for call, _ in find_differences() if call == name]


if __name__ == "__main__":
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{format_table()}\n{END}{rest.partition(END)[2]}")
