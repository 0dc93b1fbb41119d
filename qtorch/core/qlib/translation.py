"""Translate configurations with Qlib's names into ours, by the table of names.

A configuration is in Qlib's names if its `class`, `func` or `_target_` is an object of the package
`qlib`, or if it is such a name itself. Its nested configurations are translated too; all others
stay as they are. `translate_task` translates a whole task, in which some arguments of the dataset
belong to the model here, and the reverse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtorch.core.errors import ArgumentError, ConfigError, unknown_name_message
from qtorch.core.qlib.names import NAME_KEYS, has_qlib_names, qlib_name
from qtorch.core.qlib.notes import Notes
from qtorch.core.qlib.rules import RULES, Context
from qtorch.core.qlib.table import Entry, find_entry, model_arguments, unknown_class_message
from qtorch.core.trust import StoredText, as_stored_text, check_config_trust

HYDRA_KEYS = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")
TARGET = "_target_"


def translate_config(config: Any, notes: Notes | None = None, location: str = "") -> Any:
    """Translate one configuration; nested ones and those in lists are translated too.

    What is left out or belongs to another part is noted; without `notes` it is logged. Names of
    stored text stay stored text. Raises ConfigError for a name of Qlib's that is nothing here, and
    ArgumentError for an argument that Qlib's class does not take.
    """
    if notes is None:
        notes = Notes()
        translated = translate_config(config, notes, location)
        notes.log_all()
        return translated
    name = qlib_name(config)
    if name is None:
        return _translate_parts(config, notes, location)
    translated = _translate_entry(name, config, notes, location)
    is_stored = any(isinstance(part, StoredText) for part in _name_parts(config))
    return as_stored_text(translated) if is_stored else translated


def _name_parts(config: Any) -> list[Any]:
    if not isinstance(config, Mapping):
        return [config]
    return [config.get(key) for key in (*NAME_KEYS, "module_path")]


def _translate_parts(config: Any, notes: Notes, location: str) -> Any:
    """Translate what is nested in a configuration that is not in Qlib's names itself."""
    if isinstance(config, Mapping):
        return {
            key: translate_config(value, notes, _join(location, key))
            for key, value in config.items()
        }
    if isinstance(config, list | tuple):
        parts = [translate_config(v, notes, f"{location}[{k}]") for k, v in enumerate(config)]
        return type(config)(parts) if type(config) in (list, tuple) else parts
    return config


def _translate_entry(name: str, config: Any, notes: Notes, location: str) -> Any:
    entry = find_entry(name)
    place = f"{location}: " if location else ""
    if entry is None:
        raise ConfigError(f"{place}{unknown_class_message(name)}")
    if entry.refused is not None:
        raise ConfigError(f"{place}{name} is not available: {entry.refused}.")
    assert entry.target is not None, entry.name
    if isinstance(config, str):
        if not entry.settings and not entry.defaults:
            return entry.target
        config = {"class": config}
    arguments, arguments_location, hydra = _split_arguments(config, location)
    _check_arguments(entry, arguments, arguments_location)
    context = Context(entry, {**entry.defaults, **arguments}, notes, arguments_location)
    context.translate = translate_config
    for path, value in entry.settings.items():
        context.set(path, value)
    for argument, value in context.arguments.items():
        if argument in entry.arguments:
            _apply(context, argument, entry.arguments[argument], value)
        elif entry.same:
            part_location = _join(arguments_location, argument)
            context.set(argument, translate_config(value, notes, part_location))
        else:
            reason = f"Qlib's {entry.title} does not use it either"
            notes.ignore(argument, entry.title, reason)
    return {TARGET: context.target or entry.target, **hydra, **context.result}


def _split_arguments(
    config: Mapping[str, Any], location: str
) -> tuple[Mapping[str, Any], str, dict[str, Any]]:
    """Return the arguments of a configuration in either form, where they are, and Hydra's keys."""
    if TARGET in config:
        arguments = {k: v for k, v in config.items() if k not in HYDRA_KEYS}
        return arguments, location, {k: config[k] for k in HYDRA_KEYS[1:] if k in config}
    kwargs = config.get("kwargs") or {}
    if not isinstance(kwargs, Mapping):
        raise ConfigError(
            f"{_join(location, 'kwargs')}: expected a mapping of arguments, got {kwargs!r:.80}."
        )
    extra_keys = sorted(set(map(str, config)) - {"class", "func", "module_path", "kwargs"})
    if extra_keys:
        raise ConfigError(
            f"{location or 'the configuration'}: {', '.join(extra_keys)} beside class, "
            "module_path and kwargs; move it into kwargs."
        )
    return kwargs, _join(location, "kwargs"), {}


def _check_arguments(entry: Entry, arguments: Mapping[str, Any], location: str) -> None:
    if entry.same:
        return  # the class itself refuses what it does not take
    valid = set(entry.arguments)
    if entry.ignores_others:
        valid |= model_arguments()
    for name in arguments:
        if name not in valid:
            place = f"{_join(location, name)}: "
            message = unknown_name_message(
                f"argument of Qlib's {entry.title}", str(name), entry.arguments, limit=40
            )
            raise ArgumentError(place + message)


def _apply(context: Context, argument: str, rule: Any, value: Any) -> None:
    """Apply the rule of one argument."""
    title, location = context.entry.title, _join(context.location, argument)
    if isinstance(rule, str):
        context.set(rule, translate_config(value, context.notes, location))
    elif "to" in rule:
        _convert(context, argument, rule, value)
    elif "ignored" in rule:
        context.notes.ignore(argument, title, rule["ignored"])
    elif "refused" in rule:
        if value not in rule.get("allowed", ()):
            allowed = " or ".join(map(repr, rule.get("allowed", ()))) or "nothing"
            raise ConfigError(
                f"{location}: {argument} of Qlib's {title} is {value!r:.60}, but only {allowed} is "
                f"possible: {rule['refused']}."
            )
    elif "inside" in rule:
        _apply_inside(context, argument, rule["inside"], value)
    elif "move" in rule:
        context.notes.move("model", rule["move"], value, f"{argument} of {title}")
    elif rule["rule"] not in context.used_rules:
        context.used_rules.add(rule["rule"])
        context.parameters = rule
        RULES[rule["rule"]](context)


def _apply_inside(context: Context, argument: str, rules: Mapping[str, Any], value: Any) -> None:
    location = _join(context.location, argument)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{location}: expected a mapping of arguments, got {value!r:.60}.")
    for name, part in value.items():
        if name not in rules:
            kind = f"key of {argument} of Qlib's {context.entry.title}"
            raise ArgumentError(f"{location}: {unknown_name_message(kind, str(name), rules)}")
        _apply(context, str(name), rules[name], part)


def _convert(context: Context, argument: str, rule: Mapping[str, Any], value: Any) -> None:
    """Set an argument of ours to a converted value of Qlib's."""
    if "unless" in rule and value == rule["unless"]:
        return
    if rule.get("lower") and isinstance(value, str):
        value = value.lower()
    if "values" in rule:
        if value not in rule["values"]:
            message = unknown_name_message(
                f"{argument} of Qlib's {context.entry.title}", str(value), map(str, rule["values"])
            )
            raise ConfigError(f"{_join(context.location, argument)}: {message}")
        value = rule["values"][value]
    if "factor" in rule:
        value = value * rule["factor"]
    context.set(rule["to"], value)


def _join(location: str, key: Any) -> str:
    return f"{location}.{key}" if location else str(key)


# -- tasks -----------------------------------------------------------------------------------------


def translate_task(
    task: Mapping[str, Any], notes: Notes | None = None, location: str = ""
) -> dict[str, Any]:
    """Translate a task's parts; a task without Qlib's names is returned as it is.

    Arguments that belong to another part here are moved there: the batches of a MTSDatasetH to the
    model, the concepts of HIST to the dataset.
    """
    if not has_qlib_names(task):
        return dict(task)
    own_notes = Notes() if notes is None else notes
    translated: dict[str, Any] = {
        key: translate_config(value, own_notes, _join(location, key)) for key, value in task.items()
    }
    for move in own_notes.take_moves():
        part = translated.get(move.part)
        if isinstance(part, Mapping):
            translated[move.part] = move.apply(part, translated)
        elif move.is_needed:
            own_notes.warn(move.warning)
    if notes is None:
        own_notes.log_all()
    return translated


def keep_class_form(original: Any, translated: Any) -> Any:
    """Return a translated configuration as `class`, `module_path` and `kwargs` if it was so before.

    Programs read `task["dataset"]["kwargs"]["segments"]` of a stored task. Arguments that have the
    same name in both are kept in their form too.
    """
    if not (isinstance(original, Mapping) and isinstance(translated, Mapping)):
        return translated
    has_class = "class" in original and TARGET not in original
    if not has_class or TARGET not in translated or any(k in translated for k in HYDRA_KEYS[1:]):
        return translated
    target = translated[TARGET]
    module, _, title = target.rpartition(".")
    names = {"class": title, "module_path": module}
    if isinstance(target, StoredText):
        names = as_stored_text(names)
    arguments = original.get("kwargs") or {}
    kwargs = {
        key: keep_class_form(arguments.get(key), value)
        for key, value in translated.items()
        if key != TARGET
    }
    return {**names, "kwargs": kwargs}


def check_definition_trust(definition: Any) -> None:
    """Raise TrustError for the first object of a definition that is not trusted.

    Names of Qlib's stand for ours.
    """
    if has_qlib_names(definition):
        definition = translate_config(definition, Notes())
    check_config_trust(definition)
