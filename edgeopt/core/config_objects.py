"""Convert between config objects and plain data.

A config object is a frozen dataclass that a YAML file names by `_target_`: a step, a runtime, a probe, a source.
`to_config` turns it into plain data and `instantiate` turns the data back. Configs, digests, MLflow records and the
jobs of child processes all use this form.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any, get_args, get_origin

from edgeopt.core.target_aliases import current, current_fields
from edgeopt.errors import ConfigError

PLUGIN_GROUP = "edgeopt.plugins"
"""Entry point group in which plugins register their packages."""
_TYPE_NAMES: Mapping[Any, str] = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


def canonical_json(data: object) -> str:
    """Return JSON with sorted keys and without spaces, so that equal data gives equal text."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(data: object) -> str:
    """Return the SHA-256 of the canonical JSON in hexadecimal."""
    from hashlib import sha256  # importing hashlib at the top would cost the measured process 5 MiB

    return sha256(canonical_json(data).encode()).hexdigest()


def to_config(config_object: Any) -> dict[str, Any]:
    """Return `{"_target_": "module.Class", field: value, …}` in plain JSON types."""
    fields = {f.name: _to_plain(getattr(config_object, f.name)) for f in dataclasses.fields(config_object)}
    return {"_target_": f"{type(config_object).__module__}.{type(config_object).__qualname__}", **fields}


def _to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_config(value)
    if isinstance(value, (list, tuple)):
        return [_to_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _to_plain(v) for k, v in value.items()}
    return value


def instantiate(data: Any, location: str = "") -> Any:
    """Return the config object that `data` describes.

    Only classes of edgeopt and of packages with an `edgeopt.plugins` entry point are accepted, so that a config cannot
    run arbitrary code.

    Raises:
        ConfigError: the data does not fit the class. The error names the key and the fix.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(
            f"{_subject(location)} must be a mapping with the key `_target_`, got {data!r}",
            location=location,
            hint="Set `_target_` to a class and add its fields",
        )
    target = data.get("_target_")
    if not isinstance(target, str):
        raise ConfigError(
            f"`_target_` must be the dotted name of a class, got {target!r}",
            location=location,
            hint="Set `_target_` to a class of edgeopt or of a plugin",
        )
    config_class = resolve(target, location)
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    values = current_fields(target, {key: value for key, value in data.items() if key != "_target_"})
    unknown = sorted(values.keys() - fields.keys())
    if unknown:
        known = f"Its fields are: {', '.join(fields)}" if fields else "It has no fields"
        raise ConfigError(
            f"`{unknown[0]}` is not a field of {config_class.__name__}",
            location=_join(location, unknown[0]),
            hint=f"{did_you_mean(unknown[0], fields)} {known}".strip(),
        )
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and values.get(name) in (None, "???"):
            key = _join(location, name)
            raise ConfigError(f"`{name}` is required", location=key, hint=f"Set {key}=VALUE")
    annotations = typing.get_type_hints(config_class)
    checked = {k: _coerce(v, annotations[k], _join(location, k)) for k, v in values.items()}
    try:
        return config_class(**checked)
    except ConfigError as error:
        raise (error if error.location.startswith(f"{location}.") else error.at(location)) from error


def did_you_mean(name: str, known: Iterable[str], form: str = "{}") -> str:
    """Return `Did you mean …?` with the closest known name, formatted by `form`, or "" if no name is close."""
    from difflib import get_close_matches  # needed by errors only

    matches = get_close_matches(name, list(known), n=1)
    return f"Did you mean {form.format(matches[0])}?" if matches else ""


def resolve(target: str, location: str = "") -> Any:
    """Return the config class with this dotted name. Names of moved classes resolve to their successors.

    Raises:
        ConfigError: the class does not exist, is not a dataclass, or belongs neither to edgeopt nor to a plugin.
    """
    if target.split(".")[0] != "edgeopt" and target.split(".")[0] not in _plugin_packages():
        raise ConfigError(
            f"`_target_` must name a class of edgeopt or of an installed plugin, got {target!r}",
            location=location,
            hint=f"Install the plugin; its entry point must be in the group {PLUGIN_GROUP!r}",
        )
    module_name, _, class_name = current(target).rpartition(".")
    try:
        config_class = getattr(import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"`_target_` {target!r} cannot be imported ({error})", location=location, hint="Correct the dotted name"
        ) from error
    if not (isinstance(config_class, type) and dataclasses.is_dataclass(config_class)):
        raise ConfigError(
            f"`_target_` must name a dataclass, got {target!r}", location=location, hint="Name a config class"
        )
    return config_class


def _plugin_packages() -> set[str]:
    # Entry points are read for foreign targets only: reading them costs a measured process 70 ms and 5 MiB.
    from importlib.metadata import entry_points

    return {entry_point.module.split(".")[0] for entry_point in entry_points(group=PLUGIN_GROUP)}


def _coerce(value: Any, annotation: Any, location: str) -> Any:
    """Return `value` in the annotated type of its field, or raise ConfigError."""
    subject = _subject(location)
    origin = get_origin(annotation)
    if origin is typing.Literal:
        options = get_args(annotation)
        if value in options:
            return value
        hint = did_you_mean(value, [o for o in options if isinstance(o, str)]) if isinstance(value, str) else ""
        raise ConfigError(f"{subject} must be one of {_list(options)}; got {value!r}", location=location, hint=hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in get_args(annotation):
            return None
        errors = []
        for option in (h for h in get_args(annotation) if h is not type(None)):
            try:
                return _coerce(value, option, location)
            except ConfigError as error:
                errors.append(error)
        raise errors[0]
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(
                f"{subject} must be a list, got {value!r}", location=location, hint=f"Use brackets: [{value}]"
            )
        item = get_args(annotation)[0]
        return tuple(_coerce(v, item, f"{location}[{i}]") for i, v in enumerate(value))
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{subject} must be a mapping, got {value!r}", location=location)
        return {name: _coerce(v, get_args(annotation)[1], f"{location}.{name}") for name, v in value.items()}
    if isinstance(value, Mapping) and "_target_" in value:
        return instantiate(value, location)
    if annotation is Any:
        return value
    is_protocol = isinstance(annotation, type(typing.Protocol))
    if is_protocol and not dataclasses.is_dataclass(value):
        name = location.rpartition(".")[2]
        raise ConfigError(
            f"{subject} must be a mapping with the key `_target_`, got {value!r}",
            location=location,
            hint=f"To select it by name, set the config group: {name}={value}",
        )
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(annotation, type) and not is_protocol:
        fits = isinstance(value, annotation) and (annotation is bool or not isinstance(value, bool))
        if not fits:
            type_name = _TYPE_NAMES.get(annotation, f"a mapping for {annotation.__name__}")
            raise ConfigError(f"{subject} must be {type_name}, got {value!r}", location=location)
    return value


def _join(location: str, name: str) -> str:
    return f"{location}.{name}" if location else name


def _subject(location: str) -> str:
    """Return the last key of `location` as the subject of a message."""
    return f"`{location.rpartition('.')[2]}`" if location else "the config"


def _list(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))
