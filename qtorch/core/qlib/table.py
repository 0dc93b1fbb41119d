"""The table of Qlib's names: for each class and function what it is here, or why it is nothing.

The table is data: the files of `tables/`, by subject. A file has `classes`, `refused` and `groups`;
`imports` names the other modules that have a class too, because they import it.

An entry of `classes` has
- `target`: the class or function here, or `refused`: why there is none, and what comes nearest;
- `arguments`: what Qlib's arguments are here (a rule for each), in addition to those of `groups`;
- `same`: all other arguments have the same names here;
- `ignores_others`: Qlib's class takes any argument (`**kwargs`) and ignores it;
- `settings`: arguments of ours that make it what Qlib's class is;
- `defaults`: Qlib's defaults, if ours differ.

A rule is the path of an argument of ours (`trainer.max_epochs`), or a mapping with one of
- `to`: such a path, with `values` (Qlib's value: ours; `lower` first), `factor`, or `unless` (a
  value that is left out);
- `ignored`: why it means nothing here (it is named in the log);
- `refused`: why it cannot be followed, unless the value is one of `allowed`;
- `inside`: rules for the parts of a mapping;
- `move`: a path in the model's configuration, for an argument of a dataset;
- `rule`: the name of a function of `qtorch.core.qlib.rules`, with its parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from qtorch.core.errors import nearest_name

VERSION = "0.9.7"  # the version of Qlib whose names the table has
TABLES = Path(__file__).parent / "tables"
RULE_KINDS = ("to", "ignored", "refused", "inside", "move", "rule")


@dataclass(frozen=True)
class Entry:
    """What one class or function of Qlib is here."""

    name: str
    target: str | None = None
    refused: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    same: bool = False
    ignores_others: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The name of the class alone."""
        return self.name.rpartition(".")[2]


@cache
def load_table() -> dict[str, Entry]:
    """Read the table, by Qlib's full names."""
    table: dict[str, Entry] = {}
    for path in sorted(TABLES.glob("*.yaml")):
        document = _read_table(path)
        groups = document.get("groups", {})
        for name, content in document.get("classes", {}).items():
            options = dict(content)
            arguments = [groups[group] for group in options.pop("groups", ())]
            arguments.append(options.pop("arguments", {}))
            merged = {key: rule for part in arguments for key, rule in part.items()}
            table[name] = Entry(name, arguments=merged, **options)
        for refusal in document.get("refused", ()):
            table |= {n: Entry(n, refused=refusal["reason"]) for n in refusal["names"]}
    return table


@cache
def load_imports() -> dict[str, str]:
    """Read which names of Qlib's modules are classes of other modules, which they import."""
    names: dict[str, str] = {}
    for path in sorted(TABLES.glob("*.yaml")):
        for name, modules in _read_table(path).get("imports", {}).items():
            names |= {f"{module}.{name.rpartition('.')[2]}": name for module in modules}
    return names


@cache
def _read_table(path: Path) -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster, if installed
    document: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), loader)
    return document


@cache
def model_arguments() -> frozenset[str]:
    """Return the arguments of all of Qlib's models that the table has."""
    entries = load_table().values()
    return frozenset(name for e in entries if e.ignores_others for name in e.arguments)


def find_entry(name: str) -> Entry | None:
    """Return the entry of a full name, also of one that a package of Qlib exports.

    `qlib.contrib.strategy.TopkDropoutStrategy` is the class of the same name in a module of that
    package; of several modules the one with the shortest name counts (`pytorch_lstm`, not
    `pytorch_lstm_ts`). A class is also found in the modules that import it
    (`qlib.contrib.data.handler.DataHandlerLP`).
    """
    table = load_table()
    name = load_imports().get(name, name)
    if name in table:
        return table[name]
    package, _, title = name.rpartition(".")
    matches = [n for n in table if n.startswith(f"{package}.") and n.endswith(f".{title}")]
    return table[min(matches, key=lambda n: (n.count("."), len(n)))] if matches else None


def unknown_class_message(name: str) -> str:
    """Return the error message for a name that the table does not have."""
    title = name.rpartition(".")[2]
    titles = {n.rpartition(".")[2]: n for n in sorted(load_table(), reverse=True)}
    nearest = nearest_name(title, titles)
    guess = f" Did you mean {titles[nearest]!r}?" if nearest else ""
    return f"qtorch knows no {name!r} of Qlib {VERSION}.{guess}"


def rule_targets(entry: Entry) -> Iterable[str]:
    """Yield the paths of our arguments that an entry's rules write."""
    rules: list[Any] = list(entry.arguments.values())
    while rules:
        rule = rules.pop()
        if isinstance(rule, str):
            yield rule
        elif "to" in rule:
            yield rule["to"]
        elif "inside" in rule:
            rules += rule["inside"].values()
