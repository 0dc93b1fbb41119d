"""The rules of the house. A rule worth having is a test here."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "qtorch"

FLOORS = {
    "core": 0,
    "data": 1,
    "nn": 1,
    "metrics": 1,
    "tracking": 1,
    "task": 2,
    "backtest": 2,
    "model": 2,
    "record": 3,
    "trainer": 4,
    "study": 5,
    "cli": 6,
}
# One framework, one door.
DOORS = {
    "pytorch_lightning": ("qtorch/model/",),
    "lightning": ("qtorch/model/",),
    "lightning_fabric": ("qtorch/model/",),
    "mlflow": ("qtorch/tracking/mlflow_store.py",),
    "hydra": ("qtorch/core/instantiate.py", "qtorch/cli/"),
    "omegaconf": ("qtorch/core/instantiate.py", "qtorch/cli/"),
    "lightgbm": ("qtorch/model/gbdt.py",),
    "cvxpy": ("qtorch/backtest/optimizer.py",),
    "sqlalchemy": ("qtorch/task/sql.py", "qtorch/tracking/trials/storage.py"),
    "optuna": ("qtorch/tracking/trials/",),
    "ray": ("qtorch/cli/ray_launcher.py",),
    "pymongo": ("qtorch/task/mongo.py",),
    "onnx": ("qtorch/study/onnx_file.py",),
    "onnxruntime": ("qtorch/study/onnx_file.py",),
    "onnxscript": ("qtorch/study/onnx_file.py",),
}
NN_IMPORTS = {"torch", "qtorch", *sys.stdlib_module_names}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
BLOCK_LINES = 8
BANNED_NAMES = ("utils", "helpers", "legacy", "_v2", "_ts")


@cache
def modules() -> dict[Path, ast.Module]:
    return {p: ast.parse(p.read_text()) for p in sorted(PACKAGE.rglob("*.py"))}


def name_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def imports(tree: ast.AST, *, typing_too: bool = False) -> Iterator[tuple[str, ast.AST]]:
    """Every imported module of a tree, lazy ones counted, those for types alone not."""
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node) and not typing_too:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or "", node
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node
        else:
            yield from imports(node, typing_too=typing_too)


def folder(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "qtorch" and len(parts) > 1 and parts[1] in FLOORS else None


def test_every_folder_has_a_floor():
    found = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    assert found <= set(FLOORS)


def test_imports_go_down_only():
    wrong = []
    for path, tree in modules().items():
        here = folder(name_of(path))
        if here is None:
            continue
        for module, node in imports(tree, typing_too=True):
            there = folder(module)
            if there and there != here and FLOORS[there] >= FLOORS[here]:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_no_cycles():
    names = {name_of(p): tree for p, tree in modules().items()}
    graph = {n: {m for m, _ in imports(t) if m in names and m != n} for n, t in names.items()}
    state: dict[str, int] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert state.get(name) != 1, " -> ".join((*trail[trail.index(name) :], name))
        if name in state:
            return
        state[name] = 1
        for other in sorted(graph[name]):
            visit(other, (*trail, name))
        state[name] = 2

    for name in graph:
        visit(name, ())


def test_one_framework_one_door():
    wrong = []
    for path, tree in modules().items():
        where = path.relative_to(ROOT).as_posix()
        for module, node in imports(tree):
            doors = DOORS.get(module.split(".")[0])
            if doors and not where.startswith(doors):
                wrong.append(f"{where}:{node.lineno} imports {module}; its door is {doors}")
    assert not wrong, "\n".join(wrong)


# Where a module of a higher floor, or behind another door, is named in a string, and why: a process
# of its own imports it (before it forks, or to do a task), and this one does not.
NAMED = ("qtorch/task/forked.py", "qtorch/task/slot.py", "qtorch/cli/work.py")


def test_modules_are_named_in_strings_in_few_places():
    wrong = []
    for path, tree in modules().items():
        where, here = path.relative_to(ROOT).as_posix(), folder(name_of(path))
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) else None
            if not isinstance(text, str) or not re.fullmatch(r"[a-zA-Z_]\w*(\.\w+)+", text):
                continue
            there, doors = folder(text), DOORS.get(text.split(".")[0], ("",))
            if text.startswith("mlflow.") and here == "tracking":
                continue  # the names of MLflow's tags and of its file
            up = here and there and there != here and FLOORS[there] >= FLOORS[here]
            if where not in NAMED and (up or not where.startswith(doors)):
                wrong.append(f"{where}:{node.lineno} names {text}")
    assert not wrong, "\n".join(wrong)


def test_networks_import_torch_alone():
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} imports {module}"
        for path, tree in modules().items()
        if path.is_relative_to(PACKAGE / "nn") and path.name != "__init__.py"
        for module, node in imports(tree)
        if module.split(".")[0] not in NN_IMPORTS
        or (module.startswith("qtorch") and not module.startswith("qtorch.nn"))
    ]
    assert not wrong, "\n".join(wrong)


def test_sizes():
    wrong = []
    for path, tree in modules().items():
        lines = len(path.read_text().splitlines())
        if lines > MAX_FILE_LINES:
            wrong.append(f"{path.relative_to(ROOT)} has {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                if size > MAX_FUNCTION_LINES:
                    wrong.append(f"{path.relative_to(ROOT)}: {node.name} has {size} lines")
    assert not wrong, "\n".join(wrong)


def test_networks_and_models_say_nothing_twice():
    """No block of eight lines stands twice; imports and words aside."""
    seen: dict[tuple[str, ...], str] = {}
    twice = []
    for path, tree in modules().items():
        if path.parent.name not in ("nn", "model") or path.name == "__init__.py":
            continue
        lines = code_lines(path, tree)
        for start in range(len(lines) - BLOCK_LINES + 1):
            block = tuple(text for _, text in lines[start : start + BLOCK_LINES])
            place = f"{path.relative_to(ROOT)}:{lines[start][0]}"
            if (first := seen.setdefault(block, place)) != place:
                twice.append(f"{place} stands at {first} too")
    assert not twice, "\n".join(twice)


def code_lines(path: Path, tree: ast.Module) -> list[tuple[int, str]]:
    """Numbered lines without imports, docstrings and comments."""
    left_out: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            left_out |= set(range(node.lineno, (node.end_lineno or 0) + 1))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            left_out |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = [(k, text.strip()) for k, text in enumerate(path.read_text().splitlines(), 1)]
    return [(k, t) for k, t in lines if t and not t.startswith("#") and k not in left_out]


def test_no_mutable_defaults():
    wrong = []
    for path, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                defaults = [*node.args.defaults, *(d for d in node.args.kw_defaults if d)]
                for default in defaults:
                    literal = isinstance(default, ast.List | ast.Dict | ast.Set)
                    call = isinstance(default, ast.Call) and getattr(default.func, "id", "") in (
                        "list",
                        "dict",
                        "set",
                    )
                    if literal or call:
                        wrong.append(f"{path.relative_to(ROOT)}:{default.lineno}")
    assert not wrong, "\n".join(wrong)


def test_no_prints_no_bare_squeeze_no_swallowed_errors():
    wrong = []
    for path, tree in modules().items():
        where = path.relative_to(ROOT)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = node.func
                if (
                    isinstance(called, ast.Name)
                    and called.id == "print"
                    and where.parts[1] != "cli"
                ):
                    wrong.append(f"{where}:{node.lineno} prints")
                if isinstance(called, ast.Name) and called.id in ("eval", "exec"):
                    wrong.append(f"{where}:{node.lineno} calls {called.id}")
                bare = isinstance(called, ast.Attribute) and called.attr == "squeeze"
                if bare and not node.args and not node.keywords:
                    wrong.append(f"{where}:{node.lineno} has a bare squeeze()")
            if isinstance(node, ast.ExceptHandler):
                broad = node.type is None or getattr(node.type, "id", "") in (
                    "Exception",
                    "BaseException",
                )
                if broad and all(isinstance(s, ast.Pass | ast.Continue) for s in node.body):
                    wrong.append(f"{where}:{node.lineno} swallows every error")
    assert not wrong, "\n".join(wrong)


# The hooks of another framework, which name arguments that nobody here reads.
FOREIGN_HOOKS = {"on_multirun_start", "log_hyperparams"}


def test_keywords_of_any_name_are_passed_on():
    """A `**kwargs` that nobody reads would swallow a typo."""
    wrong = []
    for path, tree in modules().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not node.args.kwarg:
                continue
            decorators = {getattr(d, "id", "") for d in node.decorator_list}
            if "abstractmethod" in decorators or node.name in FOREIGN_HOOKS:
                continue
            read = {n.id for part in node.body for n in ast.walk(part) if isinstance(n, ast.Name)}
            if node.args.kwarg.arg not in read:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not wrong, "\n".join(wrong)


def test_networks_models_and_records_are_given_their_recorder():
    """They ask the one hook of tracking/ for the current run, never `R`."""
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path, tree in modules().items()
        if folder(name_of(path)) in ("core", "data", "nn", "metrics", "model", "record")
        for module, node in imports(tree)
        if module == "qtorch.tracking.r" or module.endswith(".R")
    ]
    assert not wrong, "\n".join(wrong)


# Where a process may keep a changing value of its own, and what for.
GLOBALS = {
    "qtorch/core/session.py": {"_process"},  # what `qtorch.init` sets
    "qtorch/core/heartbeat.py": {"_listeners", "_next_report"},
    "qtorch/cli/sweep.py": {"_sweep_folder"},
    "qtorch/tracking/mlflow_store.py": {"_stores_lock"},
}


def test_no_configuration_singleton():
    found = {}
    for path, tree in modules().items():
        names = {n for node in ast.walk(tree) if isinstance(node, ast.Global) for n in node.names}
        if names:
            found[path.relative_to(ROOT).as_posix()] = names
    assert found == GLOBALS


def test_names_say_what_a_file_holds():
    wrong = [str(p.relative_to(ROOT)) for p in modules() if any(b in p.stem for b in BANNED_NAMES)]
    assert not wrong, wrong


def public_names() -> list[tuple[str, str]]:
    found = []
    for path in sorted(PACKAGE.rglob("__init__.py")):
        package = importlib.import_module(name_of(path))
        found += [(package.__name__, n) for n in getattr(package, "__all__", ()) if n[0] != "_"]
    return found


def test_every_public_name_is_documented():
    wrong = []
    for package, name in public_names():
        thing = getattr(importlib.import_module(package), name)
        if not callable(thing):
            thing = type(thing)  # `R`, which is what its class says
        if not (thing.__doc__ or "").strip():
            wrong.append(f"{package}.{name}")
        if not isinstance(thing, type):
            continue
        for attr, value in vars(thing).items():
            plain = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            told = callable(plain) or isinstance(plain, property | cached_property)
            if attr.startswith("_") or not told or isinstance(plain, type):
                continue
            inherited = any(
                (getattr(b, attr, None).__doc__ or "")
                for b in thing.__mro__[1:]
                if hasattr(b, attr)
            )
            if not (getattr(plain, "__doc__", None) or inherited):
                wrong.append(f"{package}.{name}.{attr}")
    assert not wrong, "\n".join(wrong)


def test_every_module_says_what_it_is_for():
    wrong = [
        str(p.relative_to(ROOT))
        for p, t in modules().items()
        if len(ast.get_docstring(t) or "") < 10
    ]
    assert not wrong, wrong


def test_lazy_names_agree_with_what_type_checkers_see():
    for path, tree in modules().items():
        if path.name != "__init__.py":
            continue
        typed = {
            (alias.asname or alias.name): node.module
            for block in tree.body
            if is_type_checking(block)
            for node in block.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        lazy: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "lazy_names":
                lazy = ast.literal_eval(node.args[1])
        assert typed == lazy, path.relative_to(ROOT)


def test_the_project_names_no_path_of_a_machine():
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    here = Path(__file__).relative_to(ROOT).as_posix()
    wrong = []
    for name in files:
        path = ROOT / name
        if name == here or path.suffix in (".npz", ".png", ".parquet") or not path.is_file():
            continue
        text = path.read_text(errors="ignore")
        wrong += [name for top in ("work", "root", "home", "tmp/w") if f"/{top}/" in text]
    assert not wrong, wrong


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )


HEAVY = ("torch", "pytorch_lightning", "mlflow", "hydra", "pandas")


def test_importing_qtorch_is_light():
    packages = ", ".join(name_of(p) for p in sorted(PACKAGE.rglob("__init__.py")))
    code = f"import sys, {packages}; print([m for m in {HEAVY[:4]!r} if m in sys.modules])"
    assert run_python(code).stdout.strip() == "[]"
    code = f"import sys, qtorch; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert run_python(code).stdout.strip() == "[]"


def test_help_answers_in_a_second():
    command = [sys.executable, "-m", "qtorch.cli.main", "--help"]
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        best = min(best, time.perf_counter() - begin)
    assert "train" in done.stdout
    assert best < 1.0, f"{best:.2f} s"


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "constraints.txt", "scripts/test.sh"])
def test_the_files_a_newcomer_needs_are_there(name):
    assert (ROOT / name).stat().st_size > 0


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 250


def test_test_files_have_names_of_their_own():
    names = [p.name for p in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted(n for n in set(names) if names.count(n) > 1)
