"""Compose settings from conf/ and overrides, and explain what is wrong with them.

`qtorch train` lets Hydra compose its jobs and takes the explanations and the segments from here;
the other commands compose their settings with `compose_settings`.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import (
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from qtorch.cli.overrides import expand_home
from qtorch.cli.workflow.task import translate_workflow
from qtorch.core.errors import (
    ArgumentError,
    ConfigError,
    QtorchError,
    check_count,
    check_name,
    install_command,
    unknown_name_message,
)
from qtorch.core.instantiate import get_signature, resolve_config
from qtorch.core.session import resolve_path
from qtorch.core.trust import NAME_KEYS, as_stored_text, locate
from qtorch.trainer.segments import Calendars, resolve_segments

log = logging.getLogger(__name__)

ROOT_CONFIG = "train"
PORTFOLIO = "portfolio"  # the settings of the backtest, which record=full adds
HYDRA_MODES = ("run", "multirun", "cfg", "info", "shell_completion")  # of which Hydra accepts one
# The values of `runner`: this machine, the workers of a task pool, or a fleet on this machine.
LOCAL, POOL, FLEET = "local", "rm", "fleet"
# Other names under which users look for settings.
USUAL_NAMES = {
    "epochs": "trainer.max_epochs",
    "n_epochs": "trainer.max_epochs",
    "num_epochs": "trainer.max_epochs",
    "batch_size": "model.batch.size",
    "lr": "model.optimizer.lr",
    "learning_rate": "model.optimizer.lr",
    "gpus": "trainer.devices",
    "gpu": "trainer.devices",
    "loss": "model.loss",
    "optimizer": "model.optimizer",
    "network": "model.network",
}
READ_WHOLE = ("task", "hydra", "data", "dataset")  # by the command, with whatever keys they have
MISSING_KEY = object()
QUOTES = (
    "Values that contain ( ) , = : or $ need quotes inside the shell's quotes: "
    "'handler.label=[\"Ref($close,-2)/Ref($close,-1)-1\"]'."
)


def config_path() -> Path:
    """Return the folder of the shipped Hydra config groups.

    A wheel contains it inside the package (`qtorch/conf`); in an editable install it is beside the
    package, at the root of the working tree. Hydra adds a user's `--config-dir` itself.
    """
    package = Path(__file__).resolve().parents[1]
    candidates = (package / "conf", package.parent / "conf")
    for folder in candidates:
        if (folder / f"{ROOT_CONFIG}.yaml").is_file():
            return folder
    raise FileNotFoundError(
        f"cannot find qtorch's configuration ({ROOT_CONFIG}.yaml) in "
        f"{' or '.join(map(str, candidates))}: the installation is damaged, "
        "reinstall qtorch."
    )


def compose_settings(root: str, argv: Sequence[str]) -> dict[str, Any]:
    """Compose the configuration `root` with overrides and return plain data.

    `--config-dir DIR` adds a folder of config groups. Raises ConfigError with a one-line message
    that suggests the nearest name for a misspelled one.
    """
    folder, overrides = _split_arguments(expand_home(argv))
    with translate_hydra_errors(overrides, root=root), _initialize_hydra():
        if folder is not None:
            overrides = [f"hydra.searchpath=[file://{folder}]", *overrides]
        config = compose(root, overrides=overrides)
        discard_inherited_settings(config, overrides)
        check_added_keys(config, overrides)
        check_missing_values(config)
        warn_of_unread_portfolio(config, overrides)
        settings: dict[str, Any] = resolve_config(config)
    check_values(settings)
    return settings


def discard_inherited_settings(config: DictConfig, overrides: Sequence[str]) -> None:
    """Remove settings of a class that an override replaces, if the new class does not take them.

    `model.network={_target_: mine.Mean}` is merged with the network of the option that is in place
    (hidden_size, num_layers, ...). Settings that overrides name stay, and are errors if wrong.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    named_keys = {".".join(path) for o in parsed for path in _override_paths(o)}
    for target_key in (key for key in named_keys if key.endswith("._target_")):
        path = target_key.removesuffix("._target_")
        node = OmegaConf.select(config, path)
        names = None if not isinstance(node, DictConfig) else _argument_names(config, node)
        if names is None:
            continue
        inherited = [
            str(key)
            for key in node
            if str(key)[0] != "_" and key not in names and f"{path}.{key}" not in named_keys
        ]
        with open_dict(node):
            for key in inherited:
                del node[key]
        if inherited:
            text = f"{path}: left out {', '.join(inherited)}, which {node._target_} does not take"
            print(text, file=sys.stderr)


def _override_paths(override: Any) -> Iterator[tuple[str, ...]]:
    """Yield the keys of the settings that an override names."""
    key, value = override.key_or_group, override.value()
    yield (key,)
    if isinstance(value, dict):
        yield from ((key, str(name)) for name in value)


def _argument_names(config: DictConfig, node: DictConfig) -> set[str] | None:
    """Return what the class of a configuration takes; None if that is anything, or not known."""
    name = str(node.get("_target_"))
    if OmegaConf.select(config, "sweep.stored"):
        name = as_stored_text(name)
    try:
        signature = get_signature(locate(name))
    except (QtorchError, ImportError):  # the job raises it
        return None
    if signature is None:
        return None
    parameters = signature.parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return None
    return set(parameters)


def check_values(settings: Mapping[str, Any] | DictConfig) -> None:
    """Raise ConfigError for settings of a command itself, outside of the task, that mean nothing.

    Those that the command does not have are not checked.
    """
    for key, check in VALUE_CHECKS.items():
        value: Any = settings
        if isinstance(settings, DictConfig):
            value = OmegaConf.select(settings, key, throw_on_missing=False)
        else:
            for part in key.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            check(key, value)


def _check_runner(key: str, value: Any) -> None:
    check_name(key, value, (LOCAL, POOL, FLEET))


def _check_log_level(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        check_name(key, value, logging.getLevelNamesMapping())


def _check_switch(key: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{key} is {value!r}; expected true or false.")


def _check_text(key: str, value: Any) -> None:
    if not isinstance(value, str) or not value.strip():
        hint = f" (in quotes: '{key}=\"{value}\"')" if isinstance(value, int | float) else ""
        raise ConfigError(f"{key} is {value!r}; expected text{hint}.")


def _check_mapping(key: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{key} is {value!r:.60}; expected a mapping, as {key}.KEY=VALUE sets it."
        )


def _check_label(key: str, value: Any) -> None:
    if not isinstance(value, str | int | float):
        raise ConfigError(f"{key} is {value!r:.60}; expected text.")


VALUE_CHECKS: Mapping[str, Callable[[str, Any], None]] = {
    "runner": _check_runner,
    "log_level": _check_log_level,
    "experiment_name": _check_text,
    **dict.fromkeys(("run_name", "pool", "url", "sweep.name"), _check_label),
    **dict.fromkeys(("sweep.retry", "sweep.reuse", "sweep.stored"), _check_switch),
    **dict.fromkeys(("wait", "wait_only", "as_qlib", "log", "allow_nonfinite"), _check_switch),
    "fleet.max_members": check_count,
    "task": _check_mapping,
}


def check_added_keys(
    config: DictConfig, overrides: Sequence[str], further_settings: Any = None
) -> None:
    """Raise ConfigError for an override +KEY=VALUE of a new setting that nothing reads.

    A new setting is read as part of the task, of Hydra's own settings, or through references
    (`${KEY}`) of others; `further_settings` may refer to it, too.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    added = [o for o in parsed if o.is_add() and o.package is None]
    if not added:
        return
    references = [
        *_find_references(OmegaConf.to_container(config, resolve=False)),
        *_find_references(further_settings),
    ]
    for override in added:
        path = override.key_or_group.split(".")
        if path[0] in READ_WHOLE or _is_option(config, override):
            continue
        if any(r[: len(path)] == path or path[: len(r)] == r for r in references):
            continue
        raise ConfigError(_unread_key_text(path, config))


def warn_of_unread_portfolio(config: DictConfig, overrides: Sequence[str]) -> None:
    """Log a warning if an override sets up a portfolio that no record makes."""
    keys = [word.partition("=")[0] for word in overrides if word.startswith(f"{PORTFOLIO}.")]
    references = _find_references(OmegaConf.to_container(config, resolve=False))
    if keys and all(reference[0] != PORTFOLIO for reference in references):
        log.warning("%s changes nothing: add record=full, which makes a portfolio.", keys[0])


def _is_option(config: DictConfig, override: Any) -> bool:
    """Whether an override chooses an option of a config group instead of setting a value."""
    key, value = override.key_or_group, override.value()
    if "/" in key or isinstance(OmegaConf.select(config, key, throw_on_missing=False), DictConfig):
        return not isinstance(value, dict)
    return OmegaConf.select(config, key, default=MISSING_KEY) is MISSING_KEY


def _find_references(value: Any, location: tuple[str, ...] = ()) -> Iterator[list[str]]:
    """Yield the full paths of all settings that `${...}` in a nested value refers to."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _find_references(part, (*location, str(key)))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _find_references(part, (*location, str(index)))
    elif isinstance(value, str) and "${" in value:
        for dots, name in re.findall(r"[{:,\s](\.*)([A-Za-z_][\w.]*)", value):
            base = list(location[: len(location) - len(dots)]) if dots else []
            yield [*base, *name.split(".")]


def _unread_key_text(path: Sequence[str], config: DictConfig) -> str:
    """Describe a new setting that nothing reads, with the nearest one that exists."""
    settings = OmegaConf.to_container(config, resolve=False)
    while len(path) > 1 and len(_mapping_keys(settings, path[:-1])) == 1:
        path = path[:-1]  # the override has created the mapping as well
    *parents, name = path
    full_name = ".".join(path)
    places = [place for place in find_keys(config, name) if place != full_name]
    kind = f"option of {'.'.join(parents)}" if parents else "option"
    if places:
        text = f"unknown {kind} {name!r}. Did you mean {' or '.join(places)}?"
    else:
        names = [str(key) for key in _mapping_keys(settings, parents) if key != name]
        text = unknown_name_message(kind, name, names)
    return f"{text} (Nothing reads {full_name}.)"


def _mapping_keys(settings: Any, path: Sequence[str]) -> Collection[Any]:
    """Return the keys of the mapping at a path; none if there is no mapping."""
    for part in path:
        settings = settings.get(part) if isinstance(settings, Mapping) else None
    return list(settings) if isinstance(settings, Mapping) else []


def select_fleet(argv: Sequence[str]) -> list[str]:
    """Replace `runner=fleet` by the choice of the launcher that trains jobs as a fleet."""
    is_fleet = f"runner={FLEET}" in argv
    if is_fleet and any(word.startswith("hydra/launcher=") for word in argv):
        raise ConfigError("runner=fleet trains all jobs in this process: remove hydra/launcher.")
    return [f"hydra/launcher={FLEET}" if word == f"runner={FLEET}" else word for word in argv]


def _split_arguments(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    folder, overrides, words = None, [], list(argv)
    while words:
        word = words.pop(0)
        if word in ("--config-dir", "-cd"):
            folder = _resolve_folder(words.pop(0) if words else "")
        elif word.startswith("--config-dir="):
            folder = _resolve_folder(word.partition("=")[2])
        elif "=" not in word and not word.startswith("~"):
            raise ArgumentError(_not_setting_text(word, words, "or --config-dir DIR"))
        else:
            overrides.append(word)
    return folder, overrides


def check_words(words: Sequence[str]) -> None:
    """Raise ArgumentError for words that are neither settings nor options of Hydra's.

    Hydra itself answers them with its grammar or with the usage of argparse.
    """
    actions = {name: a for a in get_args_parser()._actions for name in a.option_strings}
    modes: dict[str, str] = {}  # the words that choose what Hydra does
    remaining_words = list(words)
    while remaining_words:
        word = remaining_words.pop(0)
        name, equals, _ = word.partition("=")
        if word.startswith("-") and word != "-":
            # argparse accepts the beginning of an option, too.
            action = actions.get(name) or next(
                (a for option, a in actions.items() if option.startswith(name)), None
            )
            if action is None:
                raise ArgumentError(_not_setting_text(word, remaining_words, "without dashes"))
            if action.dest in HYDRA_MODES:
                modes.setdefault(action.dest, name)
            if action.nargs != 0 and not equals and remaining_words[:1]:
                remaining_words.pop(0)
        elif not equals and not word.startswith("~"):
            text = _not_setting_text(word, remaining_words, "without spaces around =")
            raise ArgumentError(text)
    _check_modes(modes)


def _check_modes(modes: Mapping[str, str]) -> None:
    """Raise ArgumentError if several of Hydra's modes are chosen; `modes` has the word of each."""
    if len(modes) < 2:
        return
    hint = "leave out one of them."
    if "multirun" in modes and (modes.keys() & {"cfg", "info"}):
        word = modes.get("cfg") or modes.get("info")
        hint = f"{word} shows one job, so leave out {modes['multirun']}, and give each setting one "
        hint += "value."
    raise ArgumentError(f"{' and '.join(modes.values())} exclude each other: {hint}")


def _not_setting_text(word: str, next_words: Sequence[str], condition: str) -> str:
    key, equals, value = word.lstrip("-").partition("=")
    key = USUAL_NAMES.get(key, key)
    if not equals and next_words and "=" not in next_words[0]:
        value = next_words[0]
    if next_words[:1] == ["="]:
        value = next_words[1] if len(next_words) > 1 else ""
    example = f", such as {key}={value}" if key.replace(".", "").isidentifier() and value else ""
    return f"invalid override {word!r}; expected KEY=VALUE {condition}{example}."


def _resolve_folder(name: str) -> Path:
    folder = resolve_path(name).resolve()
    if not name or not folder.is_dir():
        raise ConfigError(f"--config-dir: folder {name!r} does not exist.")
    return folder


@contextmanager
def _initialize_hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_path()), version_base="1.3"):
        yield


# -- explaining errors -----------------------------------------------------------------------------


@contextmanager
def translate_hydra_errors(argv: Sequence[str] = (), root: str = ROOT_CONFIG) -> Iterator[None]:
    """Turn Hydra and OmegaConf exceptions raised inside the block into ConfigErrors."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain_error(error, argv, root)) from error
    except TypeError as error:
        # Hydra joins the value of a config group to texts.
        words = [word for word in argv if re.match(r"\+*\w+=\[.*\{", word)]
        if "can only concatenate str" not in str(error) or not words:
            raise
        raise ConfigError(
            f"{' '.join(words)}: this is a config group, whose value is the name of an option. Set "
            f"the task's own value instead: task.{words[0].lstrip('+')}"
        ) from error
    except ValueError as error:
        if "Config group override must be a string" not in str(error):
            raise
        words = [word for word in argv if re.search(r"=(.*,)?(null|None)(,|$)", word)]
        if not words:
            number = r"-?[\d.]+"
            words = [w for w in argv if re.fullmatch(rf"\+*[\w/]+=(true|false|{number})", w, re.I)]
            raise ConfigError(
                f"{' '.join(words)}: the value of a config group is the name of one of its options "
                "(a file of conf/), not a number, true or false."
            ) from error
        raise ConfigError(
            f"{' '.join(words)}: an option of a config group cannot be null. Leave it out for the "
            "default (for debug and experiment: none)."
        ) from error


def check_missing_values(config: DictConfig) -> None:
    """Raise ConfigError if a mandatory value is missing."""
    missing = sorted(OmegaConf.missing_keys(config), key=lambda k: (k.count("."), k))
    if missing:
        raise ConfigError(_missing_value_text(missing[0]))


def _explain_error(error: BaseException, argv: Sequence[str], root: str) -> str:
    """Describe a Hydra or OmegaConf error in one sentence."""
    text = _chain_text(error)
    if isinstance(error, OverrideParseException):
        return f"cannot parse the override {error.override!r}. {QUOTES}"
    if match := re.search(r"Could not find '([^']+)'", text):
        group, _, option = match[1].rpartition("/")
        option_lines = text.partition("Available options in")[2].split("\n")[1:]
        options = [line.strip() for line in option_lines if line.strip()]
        if group and options:
            message = unknown_name_message(
                f"option of {group}", option, [o for o in options if " " not in o]
            )
            if group.startswith("hydra/"):
                message += f" Launchers and sweepers are plugins: {install_command('sweep')}."
            return message
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key_text(match[1], argv, root)
    if isinstance(error, MissingMandatoryValue) or "Missing mandatory value" in text:
        key = re.search(r"(?:full_key|Missing mandatory value): ([\w.\[\]]+)", text)
        name = key[1] if key else "a value"
        return _missing_value_text(name)
    if match := re.search(r"Ambiguous value for argument '([^=]+)=(.*?)'\s*1\.", text, re.DOTALL):
        name, value = match.groups()
        sweep = ", for a sweep add -m" if root == ROOT_CONFIG else ""
        return (
            f"{name}={value} has a comma: for a list write '{name}=[{value}]', for text "
            f"'{name}=\"{value}\"'{sweep}."
        )
    if match := re.search(r"list index out of range\s+full_key: (\S+)\[(\d+)\]", text):
        return (
            f"the list {match[1]} has no item {match[2]}. An override changes an item that exists, "
            f'or replaces the whole list: "{match[1]}=[...]".'
        )
    if isinstance(error, InterpolationResolutionError):
        return f"cannot resolve the configuration: {' '.join(text.split())}"
    return " ".join(text.split())


def _missing_value_text(name: str) -> str:
    return f"{name} must be given: add {name}=... to the command."


def _chain_text(error: BaseException) -> str:
    """Join the messages of an error and its causes, without repetitions."""
    parts: list[str] = []
    current: BaseException | None = error
    while current is not None:
        if str(current) not in "\n".join(parts):
            parts.append(str(current))
        current = current.__cause__
    return "\n".join(parts)


def _unknown_key_text(key: str, argv: Sequence[str], root: str) -> str:
    """Suggest the nearest key for one that the configuration does not have."""
    *parents, name = key.split(".")
    node: Any = _compose_valid(
        [a for a in argv if not _is_override_for(a, key)], root, parents[:1] == ["hydra"]
    )
    is_alone = parents[:1] == ["hydra"] or name in NAME_KEYS  # many settings have a `_target_`
    places = [] if is_alone else find_keys(node, name)
    usual = USUAL_NAMES.get(name)
    if not places and usual is not None and OmegaConf.select(node, usual) is not None:
        places = [usual]
    for depth, part in enumerate(parents, 1):
        has_part = isinstance(node, DictConfig) and part in node
        if has_part and OmegaConf.is_interpolation(node, part):
            unresolved: Any = OmegaConf.to_container(node, resolve=False)
            reference = str(unresolved[part])
            target = ".".join([reference.removeprefix("${").removesuffix("}"), *parents[depth:]])
            return f"{'.'.join(parents[:depth])} is {reference}: set {target}.{name}=... instead."
        node = node.get(part) if has_part else None
    parent = ".".join(parents)
    if not isinstance(node, DictConfig):
        hint = f" Did you mean {' or '.join(places)}?" if places else ""
        return f"unknown option {key!r}: the configuration has no {parent!r}.{hint} " + (
            _missing_parent_hint(key, parents[0], root)
        )
    if name in node:
        return f"{key} is a mapping that accepts new keys: add them with a plus, +{key}.NAME=VALUE."
    kind = f"option of {parent}" if parent else "option"
    if places:
        message = f"unknown {kind} {name!r}. Did you mean {' or '.join(places)}?"
    else:
        message = unknown_name_message(kind, name, [str(k) for k in node])
        choices = _find_choices(key)
        if choices:
            return f"{message} It is an option of {' and '.join(choices)}."
    return f"{message} (To add a new option: +{key}=...)" if parents else message


def _find_choices(key: str) -> list[str]:
    """Return the choices of a config group, such as `data=table`, that have a setting."""
    group, _, name = key.partition(".")
    choices = []
    for path in sorted(config_path().joinpath(group).glob("*.yaml")):
        settings = OmegaConf.to_container(OmegaConf.load(path))
        own = settings.get(group, settings) if isinstance(settings, Mapping) else {}
        if name and isinstance(own, Mapping) and name in own:
            choices.append(f"{group}={path.stem}")
    return choices


def _missing_parent_hint(key: str, parent: str, root: str) -> str:
    """Say where a setting belongs whose parent the configuration of a command does not have."""
    if root == ROOT_CONFIG:
        hint = "record=full has it. " if parent == PORTFOLIO else ""
        return f"({hint}To add a new option: +{key}=...; qtorch train --cfg job shows all.)"
    if parent == PORTFOLIO:
        return (
            f"A finished run is backtested with other settings by the command of its training with "
            f"-m, record=full and {key}=...: the training is reused, and only the records run."
        )
    return f"(See qtorch {root} --help.)"


def find_keys(settings: Any, name: str, limit: int = 3) -> list[str]:
    """Return the first full names of a setting, which a user knows by its last part."""
    names = []

    def visit(node: Any, path: tuple[str, ...]) -> None:
        for key, value in node.items() if isinstance(node, Mapping) else ():
            if key == name:
                names.append(".".join((*path, str(key))))
            visit(value, (*path, str(key)))

    # Without resolving references: each setting has one place.
    visit(OmegaConf.to_container(settings, resolve=False), ())
    return names[:limit]


def _compose_valid(overrides: list[str], root: str, with_hydra: bool) -> Any:
    """Compose the configuration with the overrides that are valid.

    `with_hydra` includes Hydra's own settings.
    """
    assignments = [o for o in overrides if "=" in o and not o.startswith("-")]
    with _initialize_hydra():
        # A sweep's overrides ("a,b") do not compose. If the others do not either: the defaults.
        for attempt in ([o for o in assignments if "," not in o], []):
            try:
                return compose(root, overrides=attempt, return_hydra_config=with_hydra)
            except HydraException:
                continue
    return OmegaConf.create()


def _is_override_for(override: str, key: str) -> bool:
    return override.lstrip("+~").split("=")[0].split("@")[0] == key


def job_task(settings: Mapping[str, Any], calendars: Calendars | None = None) -> dict[str, Any]:
    """Return a job's task with dates as segments."""
    return resolve_segments(task_definition(settings), calendars)


def task_definition(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a job's task as it was composed; its text is stored text in a resumed sweep.

    The task of a workflow file is translated into our names.
    """
    task: Mapping[str, Any] = settings["task"]
    if settings["sweep"]["stored"]:
        task = as_stored_text(task)
    return translate_workflow(settings, task) if "workflow" in settings else task
