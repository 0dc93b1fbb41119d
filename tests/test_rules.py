"""Rules about the code itself: what may import what, sizes, names, and what no module may do."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path

import plain_names
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "qtorch"
pytestmark = pytest.mark.xdist_group("rules")  # one process parses the files

FLOORS = {
    "core": 0,
    "process": 1,
    "compat": 1,
    "data": 2,
    "nn": 2,
    "metrics": 2,
    "tracking": 2,
    "task": 3,
    "backtest": 3,
    "model": 3,
    "record": 4,
    "trainer": 5,
    "study": 6,
    "cli": 7,
}
# The only places that import a framework.
DOORS = {
    "pytorch_lightning": ("qtorch/model/",),
    "lightning": ("qtorch/model/",),
    "lightning_fabric": ("qtorch/model/",),
    "mlflow": (
        "qtorch/tracking/mlflow_store.py",
        "qtorch/tracking/mlflow_responses.py",
        "qtorch/tracking/mlflow_active_run.py",
    ),
    "hydra": ("qtorch/core/instantiate.py", "qtorch/cli/"),
    "omegaconf": ("qtorch/core/instantiate.py", "qtorch/cli/"),
    "lightgbm": ("qtorch/model/tabular/gbdt.py", "qtorch/model/tabular/double_ensemble.py"),
    "xgboost": ("qtorch/model/tabular/xgboost.py",),
    "catboost": ("qtorch/model/tabular/catboost.py",),
    "cvxpy": ("qtorch/backtest/enhanced_indexing.py",),
    "jinja2": ("qtorch/record/report/page.py", "qtorch/cli/workflow/file.py"),
    "sqlalchemy": ("qtorch/task/stores/sql.py", "qtorch/study/search/storage.py"),
    "optuna": ("qtorch/study/search/",),
    "ray": ("qtorch/cli/launchers/ray.py",),
    "pymongo": ("qtorch/task/stores/mongo.py",),
    "onnx": ("qtorch/study/onnx_file.py",),
    "onnxruntime": ("qtorch/study/onnx_file.py",),
    "onnxscript": ("qtorch/study/onnx_file.py",),
    "plotly": ("qtorch/record/report/graphs.py",),
}
NN_IMPORTS = {"torch", "qtorch", *sys.stdlib_module_names}
MAX_FILE_LINES, MAX_FILES_IN_A_FOLDER = 900, 20
USUAL_FUNCTION_LINES, MAX_FUNCTION_LINES = 60, 100
BLOCK_LINES = 8
BANNED_NAMES = ("utils", "helpers", "legacy", "_v2", "_ts")


@cache
def modules() -> dict[Path, ast.Module]:
    return {p: ast.parse(p.read_text()) for p in sorted(PACKAGE.rglob("*.py"))}


@cache
def nodes(path: Path) -> list[ast.AST]:
    """Return all nodes of a module of the package."""
    return list(ast.walk(modules()[path]))


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def imports(tree: ast.AST, *, typing_too: bool = False) -> Iterator[tuple[str, ast.AST]]:
    """Yield every imported module, lazy imports included; those for types only if asked for."""
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
        elif not isinstance(node, ast.expr):  # no expression holds an import
            yield from imports(node, typing_too=typing_too)


def folder(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "qtorch" and len(parts) > 1 and parts[1] in FLOORS else None


def test_every_folder_has_a_floor():
    packages = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    assert packages <= set(FLOORS)


def test_imports_go_down_only():
    wrong = []
    for path, tree in modules().items():
        package = folder(module_name(path))
        if package is None:
            continue
        for module, node in imports(tree, typing_too=True):
            target = folder(module)
            if target and target != package and FLOORS[target] >= FLOORS[package]:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_no_import_cycles_even_for_types():
    names = {module_name(path): tree for path, tree in modules().items()}
    packages = {module_name(path) for path in modules() if path.name == "__init__.py"}
    graph = {
        name: {
            module
            for module, _ in imports(tree, typing_too=True)
            if module in names and module not in packages and module != name
        }
        for name, tree in names.items()
        if name not in packages
    }
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
        file = path.relative_to(ROOT).as_posix()
        for module, node in imports(tree):
            doors = DOORS.get(module.split(".")[0])
            if doors and not file.startswith(doors):
                wrong.append(f"{file}:{node.lineno} imports {module}; its door is {doors}")
    assert not wrong, "\n".join(wrong)


# The modules that name a module of a higher floor (or of a framework with another door) in a
# string, because another process imports it, never this one.
NAMED = (
    "qtorch/process/fork_server.py",
    "qtorch/task/worker.py",
    "qtorch/trainer/preload.py",
    "qtorch/cli/guard.py",
    "qtorch/core/trust.py",
)


def test_modules_are_named_in_strings_in_few_places():
    wrong = []
    for path in modules():
        file, package = path.relative_to(ROOT).as_posix(), folder(module_name(path))
        for node in nodes(path):
            text = node.value if isinstance(node, ast.Constant) else None
            if not isinstance(text, str) or not re.fullmatch(r"[a-zA-Z_]\w*(\.\w+)+", text):
                continue
            target, doors = folder(text), DOORS.get(text.split(".")[0], ("",))
            if text.startswith("mlflow.") and package == "tracking":
                continue  # the names of MLflow's tags and of its file
            is_higher = (
                package and target and target != package and FLOORS[target] >= FLOORS[package]
            )
            if file not in NAMED and (is_higher or not file.startswith(doors)):
                wrong.append(f"{file}:{node.lineno} names {text}")
    assert not wrong, "\n".join(wrong)


# Where names become objects, and where pickles of another process of the same user are read.
NAME_DOORS = {
    "import_module": ("qtorch/core/", "qtorch/cli/main.py", "qtorch/trainer/preload.py"),
    "import_object": ("qtorch/core/", "qtorch/process/child.py"),
    "loads": (
        "qtorch/core/trust.py",
        "qtorch/model/devices/",
        "qtorch/trainer/subprocess_tasks.py",
    ),
    "Unpickler": ("qtorch/core/trust.py",),
    "__import__": (),
    "eval": (),
    "exec": (),
}


def test_names_become_objects_and_pickles_are_read_in_few_places():
    pickling = {f"{m}.{f}" for m in ("pickle", "cloudpickle", "joblib") for f in ("load", "loads")}
    wrong = []
    for path in modules():
        file = path.relative_to(ROOT).as_posix()
        for node in (n for n in nodes(path) if isinstance(n, ast.Call)):
            call = ast.unparse(node.func)
            is_method = call.partition(".")[0] not in ("pickle", "importlib", call)
            name = "loads" if call in pickling else call.rpartition(".")[2]
            doors = None if is_method and call not in pickling else NAME_DOORS.get(name)
            if doors is not None and not file.startswith(doors):
                wrong.append(f"{file}:{node.lineno} calls {call}")
            if call == "torch.load" and "weights_only" not in {k.arg for k in node.keywords}:
                wrong.append(f"{file}:{node.lineno} loads more than weights")
    assert not wrong, "\n".join(wrong)


def test_paths_of_users_are_resolved_in_one_place():
    """A relative path starts where the command began, and `~` is the home folder."""
    doors = ("qtorch/core/session.py", "qtorch/core/content_digest.py")
    wrong = [
        f"{file}:{node.lineno} calls {ast.unparse(node.func)}"
        for path, tree in modules().items()
        if (file := path.relative_to(ROOT).as_posix()) not in doors
        for node in nodes(path)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).rpartition(".")[2] in ("expanduser", "abspath")
    ]
    assert not wrong, "use qtorch.core.session.resolve_path:\n" + "\n".join(wrong)


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


def test_files_and_folders_are_not_too_large():
    wrong = []
    files: Counter[Path] = Counter()
    for path in modules():
        files[path.parent] += 1
        lines = len(path.read_text().splitlines())
        if lines > MAX_FILE_LINES:
            wrong.append(f"{path.relative_to(ROOT)} has {lines} lines")
    wrong += [
        f"{package.relative_to(ROOT)} has {count} files"
        for package, count in files.items()
        if count > MAX_FILES_IN_A_FOLDER
    ]
    assert not wrong, "\n".join(wrong)


def test_functions_are_rarely_long():
    """Their complexity is checked by ruff (C901, at most 10)."""
    sizes = {
        f"{path.relative_to(ROOT)}: {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path, tree in modules().items()
        for node in nodes(path)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    long = {name: size for name, size in sizes.items() if size > USUAL_FUNCTION_LINES}
    assert max(sizes.values()) <= MAX_FUNCTION_LINES, max(sizes.items(), key=lambda item: item[1])
    assert len(long) <= len(sizes) / 100, long


def test_names_are_plain_english():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name} {fault}"
        for top in ("qtorch", "tests", "scripts")
        for path in sorted((ROOT / top).rglob("*.py"))
        for name, line, fault in plain_names.faulty_names(ast.parse(path.read_text()))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["told", "_checked", "weights_of", "over", "load_fitted", "_anew"])
def test_the_rule_on_names_refuses_the_old_dialect(name):
    assert plain_names.function_fault(name)


@pytest.mark.parametrize("name", ["serialize_error", "loss_sums", "is_stacked", "seed_everything"])
def test_the_rule_on_names_allows_plain_ones(name):
    assert plain_names.function_fault(name) is None


def test_networks_and_models_repeat_no_block():
    """No block of eight lines occurs twice, apart from imports, docstrings and comments."""
    first_places: dict[tuple[str, ...], str] = {}
    twice = []
    for path, tree in modules().items():
        if folder(module_name(path)) not in ("nn", "model") or path.name == "__init__.py":
            continue
        lines = code_lines(path, tree)
        for start in range(len(lines) - BLOCK_LINES + 1):
            block = tuple(text for _, text in lines[start : start + BLOCK_LINES])
            place = f"{path.relative_to(ROOT)}:{lines[start][0]}"
            if (first := first_places.setdefault(block, place)) != place:
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
    for path in modules():
        for node in nodes(path):
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
    for path in modules():
        file = path.relative_to(ROOT)
        for node in nodes(path):
            if isinstance(node, ast.Call):
                function = node.func
                if (
                    isinstance(function, ast.Name)
                    and function.id == "print"
                    and file.parts[1] != "cli"
                ):
                    wrong.append(f"{file}:{node.lineno} prints")
                if isinstance(function, ast.Name) and function.id in ("eval", "exec"):
                    wrong.append(f"{file}:{node.lineno} calls {function.id}")
                bare = isinstance(function, ast.Attribute) and function.attr == "squeeze"
                if bare and not node.args and not node.keywords:
                    wrong.append(f"{file}:{node.lineno} has a bare squeeze()")
            if isinstance(node, ast.ExceptHandler):
                broad = node.type is None or getattr(node.type, "id", "") in (
                    "Exception",
                    "BaseException",
                )
                if broad and all(isinstance(s, ast.Pass | ast.Continue) for s in node.body):
                    wrong.append(f"{file}:{node.lineno} swallows every error")
    assert not wrong, "\n".join(wrong)


# Hooks of other frameworks whose keyword arguments qtorch does not read.
FRAMEWORK_HOOKS = {"on_multirun_start", "log_hyperparams"}


def test_csv_files_are_read_in_one_place():
    """pandas reads an instrument called NA as missing; `qtorch.core.tables.read_csv` does not."""
    scripts = (
        path for path in (ROOT / "scripts").rglob("*.py") if "pd.read_csv" in path.read_text()
    )
    package = (path for path in modules() if "pd.read_csv" in path.read_text())
    assert [*package, *scripts] == [PACKAGE / "core" / "tables.py"]


# What would show a user's words as markup, or as commands of the terminal: the console of
# `qtorch.core.terminal` does neither.
RICH_PARTS = {"rich.console.Console", "rich.markup", "rich.print", "rich.progress.Progress",
              "rich.progress.track", "rich.get_console"}  # fmt: skip
CONSOLE_FILE = "qtorch/core/terminal.py"


def test_users_words_are_never_markup():
    wrong = []
    for path, tree in modules().items():
        file = path.relative_to(ROOT).as_posix()
        if file == CONSOLE_FILE:
            continue
        wrong += [
            f"{file}:{node.lineno} imports {module}"
            for module, node in imports(tree)
            if module in RICH_PARTS
        ]
        for node in (n for n in nodes(path) if isinstance(n, ast.Call)):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            keywords = {keyword.arg for keyword in node.keywords}
            needs = {"RichHandler": "console", "Live": "console", "TextColumn": "markup"}.get(name)
            if name in ("from_markup", "render_str") or (needs and needs not in keywords):
                wrong.append(f"{file}:{node.lineno} calls {name} without {needs}")
    assert not wrong, "\n".join(wrong)


def has_raw_error(node: ast.AST) -> bool:
    """Whether an expression contains an error's text that is not made printable."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("printable_text", "error_line"):
        return False
    key = node.slice if isinstance(node, ast.Subscript) else None
    names = [getattr(node, "id", ""), getattr(node, "attr", ""), getattr(key, "value", "")]
    is_error = any(re.search(r"(^|_)error(_|$)", str(name)) for name in names)
    return is_error or any(map(has_raw_error, ast.iter_child_nodes(node)))


def test_errors_are_printed_without_commands_of_the_terminal():
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} prints {ast.unparse(node)}"
        for path, tree in modules().items()
        for node in nodes(path)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
        if any(map(has_raw_error, node.args))
    ]
    assert not wrong, "\n".join(wrong)


def test_keywords_of_any_name_are_passed_on():
    """A `**kwargs` that nobody reads would swallow a typo."""
    wrong = []
    for path in modules():
        for node in nodes(path):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not node.args.kwarg:
                continue
            is_interface = len(node.body) == 1 and ast.get_docstring(node) is not None
            if is_interface or node.name in FRAMEWORK_HOOKS:
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
        if folder(module_name(path)) in ("core", "data", "nn", "metrics", "model", "record")
        for module, node in imports(tree)
        if module.endswith(".R")
    ]
    assert not wrong, "\n".join(wrong)


# Where a process may keep a changing value of its own, and what for.
GLOBALS = {
    "qtorch/core/session.py": {"_process"},  # what `qtorch.init` sets
    "qtorch/process/heartbeat.py": {"_listeners", "_next_report"},
    "qtorch/process/server_memory.py": {"_is_server"},  # False in the server's children
    "qtorch/tracking/mlflow_store.py": {"_stores_lock"},
}


def test_no_configuration_singleton():
    module_globals = {}
    for path in modules():
        names = {n for node in nodes(path) if isinstance(node, ast.Global) for n in node.names}
        if names:
            module_globals[path.relative_to(ROOT).as_posix()] = names
    assert module_globals == GLOBALS


def test_names_say_what_a_file_holds():
    wrong = [str(p.relative_to(ROOT)) for p in modules() if any(b in p.stem for b in BANNED_NAMES)]
    assert not wrong, wrong


def public_names() -> list[tuple[str, str]]:
    names = []
    for path in sorted(PACKAGE.rglob("__init__.py")):
        package = importlib.import_module(module_name(path))
        names += [(package.__name__, n) for n in getattr(package, "__all__", ()) if n[0] != "_"]
    return names


def test_every_public_name_is_documented():
    wrong = []
    for package, name in public_names():
        value = getattr(importlib.import_module(package), name)
        if not callable(value):
            value = type(value)  # the documentation of `R` is that of its class
        if not (value.__doc__ or "").strip():
            wrong.append(f"{package}.{name}")
        if not isinstance(value, type):
            continue
        for attr, member in vars(value).items():
            function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            is_documentable = callable(function) or isinstance(function, property | cached_property)
            if attr.startswith("_") or not is_documentable or isinstance(function, type):
                continue
            inherited_doc = any(
                (getattr(b, attr, None).__doc__ or "")
                for b in value.__mro__[1:]
                if hasattr(b, attr)
            )
            if not (getattr(function, "__doc__", None) or inherited_doc):
                wrong.append(f"{package}.{name}.{attr}")
    assert not wrong, "\n".join(wrong)


def test_every_module_says_what_it_is_for():
    wrong = [
        str(p.relative_to(ROOT))
        for p, t in modules().items()
        if len(ast.get_docstring(t) or "") < 10
    ]
    assert not wrong, wrong


def test_public_names_are_those_that_type_checkers_see():
    for path, tree in modules().items():
        if path.name != "__init__.py":
            continue
        type_checked = [
            alias.asname
            for block in tree.body
            if is_type_checking(block)
            for node in block.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        ]
        package = importlib.import_module(module_name(path))
        assert getattr(package, "__all__", []) == sorted(type_checked), path.relative_to(ROOT)


def test_the_project_names_no_path_of_a_machine():
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    package = Path(__file__).relative_to(ROOT).as_posix()
    wrong = []
    for name in files:
        path = ROOT / name
        if name == package or path.suffix in (".npz", ".png", ".parquet") or not path.is_file():
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
    packages = ", ".join(module_name(p) for p in sorted(PACKAGE.rglob("__init__.py")))
    code = f"import sys, {packages}; print([m for m in {HEAVY[:4]!r} if m in sys.modules])"
    assert run_python(code).stdout.strip() == "[]"
    code = f"import sys, qtorch; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert run_python(code).stdout.strip() == "[]"


def test_help_answers_in_a_second():
    command = [sys.executable, "-m", "qtorch.cli.main", "--help"]
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        best = min(best, time.perf_counter() - begin)
    assert "train" in result.stdout
    assert best < 1.0, f"{best:.2f} s"


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "constraints.txt", "scripts/test.sh"])
def test_the_files_a_newcomer_needs_are_there(name):
    assert (ROOT / name).stat().st_size > 0


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 130


def test_groups_of_tests_run_in_one_process(request):
    """pytest-xdist 3.8 does not see the groups with pytest 9.2."""
    if getattr(request.config.option, "loadgroup", False):
        assert request.node.nodeid.endswith("@rules")


def test_the_readme_counts_the_models():
    # The configuration `lightning` is for a LightningModule of the user's.
    models = {p.stem for p in (ROOT / "conf/model").glob("*.yaml")} - {"lightning"}
    assert f" {len(models)} models" in (ROOT / "README.md").read_text()


def test_each_promise_of_the_security_page_names_tests_that_exist():
    """A name without a folder lies in the folder of the name before it."""
    lines = (ROOT / "docs" / "security.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|")][2:]
    assert len(rows) > 10
    wrong = []
    for row in rows:
        promise, tests = row.strip("|").rsplit("|", 1)
        names = re.findall(r"`([\w/]+(?:\.py)?)`", tests)
        paths: list[Path] = []
        for name in names:
            paths.append(ROOT / name if "/" in name else paths[-1].with_name(name))
        missing_names = [p.relative_to(ROOT).as_posix() for p in paths if not p.exists()]
        if missing_names or not any(p.is_relative_to(ROOT / "tests") for p in paths):
            wrong.append(f"{promise.strip()}: {missing_names or 'no test'}")
    assert not wrong, "\n".join(wrong)


def test_test_files_have_names_of_their_own():
    names = [p.name for p in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted(n for n in set(names) if names.count(n) > 1)
