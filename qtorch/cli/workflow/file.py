"""Read a workflow file in Qlib's format: templates, anchors, merge keys and a base file.

The text is rendered by jinja2 with the variables of the environment, and read as YAML 1.2 as Qlib
does (`1e-4` is a number, `yes` a word). An alias of a value at the top level, such as `*market`,
becomes an interpolation (`${market}`), so that an override of `market` reaches every place.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from jinja2 import TemplateError, meta, nodes
from jinja2.sandbox import SandboxedEnvironment

from qtorch.core.errors import ConfigError, TrustError, unknown_name_message
from qtorch.core.session import resolve_path

log = logging.getLogger(__name__)

BASE_KEY = "BASE_CONFIG_PATH"
DROP = "__DROP__"  # a value that takes a key of the base file away
TASK, INIT, SYSTEM = "task", "qlib_init", "sys"
EXPECTED = "a workflow has the sections qlib_init and task (see docs/from-qlib.md)"
MISPLACED_KEYS = ("model", "dataset", "record")
_INTERPOLATION = re.compile(r"\$\{(\w+)\}")

Keys = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """Reads scalars by the rules of YAML 1.2, as ruamel.yaml does, which Qlib uses."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 - PyYAML's own form


for _tag, _pattern, _first in (
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", "tTfF"),
    ("int", r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)", "-+0123456789"),
    (
        "float",
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.nan)",
        "-+0123456789.",
    ),
    ("merge", r"<<", "<"),
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^{_pattern}$"), _first)


@dataclass(frozen=True)
class Alias:
    """A reference to the value of a key at the top level of the file."""

    key: str
    value: Any


@dataclass
class Workflow:
    """A workflow: its sections as plain data with interpolations, and where each value stands."""

    path: Path
    text: str  # as plain YAML, without templates and base files
    document: dict[str, Any]
    places: dict[Keys, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """A short hash of the content."""
        return sha256(self.text.encode()).hexdigest()[:8]

    def find_place(self, path: Keys) -> str:
        """Return the file and line of a value, or of the nearest one around it."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, self.path.name)


def read_workflow(path: str | Path, reserved: Mapping[str, Any] | None = None) -> Workflow:
    """Read a workflow file and its base file.

    `reserved` are keys at the top level that mean something else here: a file may use them for its
    anchors, but its values are not kept there. Raises ConfigError with the place of a fault.
    """
    file = resolve_path(path).resolve()
    if not file.is_file():
        raise ConfigError(f"there is no workflow file {str(path)!r}.")
    places: dict[Keys, str] = {}
    document = _load(render_template(file), file, places)
    base = document.pop(BASE_KEY, None)
    if base is not None:
        base_file = _find_base(str(base), file)
        base_places: dict[Keys, str] = {}
        base_document = _load(_read_text(base_file), base_file, base_places)
        document = _merge(base_document, document)
        places = {**base_places, **places}
    _check_sections(document, file)
    _make_paths_absolute(document, file)
    plain = _render(document, {}, frozenset(reserved or ()))
    return Workflow(file, yaml.safe_dump(plain, sort_keys=False), plain, places)


def load_stored_workflow(text: str, name: str) -> dict[str, Any]:
    """Return the document of a stored workflow; TrustError for an interpolation of other kinds."""
    document: dict[str, Any] = yaml.safe_load(text)
    for reference in re.findall(r"\\?\$\{[^}]*\}?", text):
        match = _INTERPOLATION.fullmatch(reference)
        if not reference.startswith("\\") and (match is None or match[1] not in document):
            raise TrustError(
                f"the stored workflow {name} contains {reference!r}: an interpolation may read "
                "this machine's environment. If the workflow is yours, add trusted=true."
            )
    return document


def render_template(file: Path) -> str:
    """Render the file with the variables of the environment; others are empty, as in Qlib."""
    text = _read_text(file)
    environment = SandboxedEnvironment(autoescape=False, keep_trailing_newline=True)
    try:
        tree = environment.parse(text)
        names = meta.find_undeclared_variables(tree)
        missing = sorted(names - os.environ.keys() - _optional_variables(tree))
        if missing:
            log.warning(
                "%s: the template's variables %s are not in the environment: they are empty.",
                file.name,
                ", ".join(missing),
            )
        values = {name: os.environ[name] for name in names if name in os.environ}
        return environment.from_string(text).render(values)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        place = f"{file.name} line {line}" if line else file.name
        raise ConfigError(
            f"{place}: cannot render the template (jinja2): {error}. Text with {{{{ or {{% that is "
            "no template stands between {% raw %} and {% endraw %}."
        ) from error


def _optional_variables(tree: nodes.Template) -> set[str]:
    """Return the variables that have a default, or that the template itself tests."""
    parts: list[nodes.Node | None] = [part.test for part in tree.find_all(nodes.If)]
    parts += [part.test for part in tree.find_all(nodes.CondExpr)]
    parts += [f.node for f in tree.find_all(nodes.Filter) if f.name in ("default", "d")]
    return {part.name for part in parts if isinstance(part, nodes.Name)}


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not a text file in UTF-8: {error}.") from error


def _find_base(name: str, file: Path) -> Path:
    """Find a base file: a path from the working folder, or from the folder of the workflow."""
    candidates = [resolve_path(name), file.parent / name]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    places = " nor ".join(str(c.absolute()) for c in dict.fromkeys(candidates))
    raise ConfigError(f"{file.name}: {BASE_KEY} is {name!r}, but there is no file {places}.")


# -- YAML ------------------------------------------------------------------------------------------


def _load(text: str, file: Path, places: dict[Keys, str]) -> dict[str, Any]:
    """Parse the text into nested dicts and lists with `Alias` values; fill `places`."""
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(
                f"{file.name}: expected sections (key: value), got "
                f"{'nothing' if root is None else 'a ' + root.tag.rpartition(':')[2]}; {EXPECTED}."
            )
        document: dict[str, Any] = _Builder(loader, root, file, places).build(root, ())
        return document
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f" line {mark.line + 1}"
        raise ConfigError(
            f"{file.name}{line}: this is not YAML: {error.problem or error.context}. Text with "
            "': ', '#', or a leading @, &, * or % needs quotes, and indentation is by spaces."
        ) from error
    finally:
        loader.dispose()


class _Builder:
    """Builds plain values from the nodes of one file."""

    def __init__(
        self, loader: _Loader, root: yaml.MappingNode, file: Path, places: dict[Keys, str]
    ) -> None:
        self._loader, self._file, self._places = loader, file, places
        self._top_nodes = {
            id(value): str(key.value) for key, value in root.value if isinstance(key.value, str)
        }

    def build(self, node: Any, path: Keys) -> Any:
        """Return the value of a node at a path of keys and indices."""
        self._places.setdefault(path, f"{self._file.name} line {node.start_mark.line + 1}")
        key = self._top_nodes.get(id(node))
        if key is not None and path != (key,):
            return Alias(key, self._build_content(node, path))
        return self._build_content(node, path)

    def _build_content(self, node: Any, path: Keys) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self._build_mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(part, (*path, k)) for k, part in enumerate(node.value)]
        return self._loader.construct_object(node)

    def _build_mapping(self, node: yaml.MappingNode, path: Keys) -> dict[str, Any]:
        content: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = f"{self._file.name} line {key_node.start_mark.line + 1}"
            if key_node.tag == "tag:yaml.org,2002:merge":
                merged = {**self._build_merge(value_node, path, place), **merged}
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{place}: a key is a word, not a {key_node.id}.")
            key = str(self._loader.construct_object(key_node))
            if key in content:
                raise ConfigError(f"{place}: the key {key!r} stands twice; keep one of them.")
            self._places[(*path, key)] = place
            content[key] = self.build(value_node, (*path, key))
        return {**{k: v for k, v in merged.items() if k not in content}, **content}

    def _build_merge(self, node: Any, path: Keys, place: str) -> dict[str, Any]:
        """Return the content of a merge key: a mapping, or several, of which the first wins."""
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        merged: dict[str, Any] = {}
        for part in parts:
            if not isinstance(part, yaml.MappingNode):
                raise ConfigError(f"{place}: << merges mappings (<<: *name), not a {part.id}.")
            merged = {**self._build_mapping(part, path), **merged}
        return merged


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Update a base file as Qlib does: mappings key by key, everything else is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        old_value = old.value if isinstance(old, Alias) else old
        if value == DROP:
            merged.pop(key, None)
        elif isinstance(old_value, dict) and isinstance(value, dict):
            merged[key] = _merge(old_value, value)
        else:
            merged[key] = value
    return merged


def _render(value: Any, top: Mapping[str, Any], reserved: frozenset[str]) -> Any:
    """Return plain data: aliases as interpolations, dates as text; other `${` are escaped."""
    if isinstance(value, Alias):
        if value.key in reserved:
            return _render(value.value, top, reserved)
        return f"${{{value.key}}}"
    if isinstance(value, dict):
        items = {k: v for k, v in value.items() if top or k not in reserved}
        return {k: _render(v, top or value, reserved) for k, v in items.items()}
    if isinstance(value, list):
        return [_render(part, top, reserved) for part in value]
    if isinstance(value, str):
        return value.replace("${", r"\${")
    return value if value is None or isinstance(value, bool | int | float) else str(value)


# -- sections --------------------------------------------------------------------------------------


def _check_sections(document: Mapping[str, Any], file: Path) -> None:
    """Raise ConfigError for a file that is not a workflow."""
    task = document.get(TASK)
    if not isinstance(task, Mapping):
        misplaced = [key for key in MISPLACED_KEYS if key in document]
        hint = ""
        if misplaced:
            hint = f" Indent {', '.join(misplaced)} under 'task:'."
        elif TASK not in document:
            hint = f" {unknown_name_message('section', next(iter(document), ''), (TASK, INIT))}"
        raise ConfigError(f"{file.name} has no section 'task' with model and dataset.{hint}")
    init = document.get(INIT)
    if init is not None and not isinstance(init, Mapping):
        raise ConfigError(
            f"{file.name}: qlib_init is {init!r:.60}, expected a mapping with provider_uri and "
            "region."
        )


def _make_paths_absolute(document: dict[str, Any], file: Path) -> None:
    """Replace the folders of the section `sys` by absolute ones."""
    section = document.get(SYSTEM)
    if section is None:
        return
    if not isinstance(section, Mapping) or set(section) - {"path", "rel_path"}:
        raise ConfigError(f"{file.name}: sys is {section!r:.60}, expected path and rel_path.")
    folders = [str(resolve_path(p)) for p in _as_list(section.get("path"))]
    folders += [str((file.parent / p).resolve()) for p in _as_list(section.get("rel_path"))]
    document[SYSTEM] = {"path": folders}


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)
