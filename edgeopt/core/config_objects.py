"""Parts: the frozen dataclasses that a YAML names by `_target_` (steps, runtimes, probes, sources).

`describe` turns a part into plain data and `construct` turns the data back, so that the same words
stand in a config, in a digest, in MLflow and in the job of a child process.
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


def canonical_json(data: object) -> str:
    """JSON with sorted keys and no spaces: equal data gives equal text."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(data: object) -> str:
    """sha256 of the canonical JSON, in hexadecimal."""
    from hashlib import sha256  # its library takes 5 MiB, which the measured process does without

    return sha256(canonical_json(data).encode()).hexdigest()


def to_config(part: Any) -> dict[str, Any]:
    """`{"_target_": "module.Class", field: value, …}` of a part, in plain JSON types."""
    fields = {f.name: _plain(getattr(part, f.name)) for f in dataclasses.fields(part)}
    return {"_target_": f"{type(part).__module__}.{type(part).__qualname__}", **fields}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_config(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return value


def instantiate(data: Any, location: str = "") -> Any:
    """The part that `data` describes; ConfigError names the key and the mend.

    Only classes under `edgeopt.` or under the module of an installed `edgeopt.plugins` entry point
    may be named, so a config cannot run arbitrary code.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{data!r} is not a mapping", location=location, hint="Give _target_ and its values")
    target = data.get("_target_")
    if not isinstance(target, str):
        raise ConfigError("no _target_ is named", location=location, hint="Give the dotted name of a class in edgeopt")
    part_class = resolve(target, location)
    fields = {f.name: f for f in dataclasses.fields(part_class)}
    values = current_fields(target, {key: value for key, value in data.items() if key != "_target_"})
    unknown = sorted(values.keys() - fields.keys())
    if unknown:
        takes = f"{part_class.__name__} takes: {', '.join(fields) or 'no keys'}"
        raise ConfigError(
            f"unknown key {unknown[0]!r}",
            location=f"{location}.{unknown[0]}" if location else unknown[0],
            hint=f"{did_you_mean(unknown[0], fields)} {takes}".strip(),
        )
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and values.get(name) in (None, "???"):
            raise ConfigError(
                "a value is required", location=f"{location}.{name}" if location else name, hint=f"Set {name}"
            )
    hints = typing.get_type_hints(part_class)
    checked = {k: _coerce(v, hints[k], f"{location}.{k}" if location else k) for k, v in values.items()}
    try:
        return part_class(**checked)
    except ConfigError as error:
        raise (error if error.location.startswith(f"{location}.") else error.at(location)) from error


def did_you_mean(given: str, known: Iterable[str], form: str = "{}") -> str:
    """`Did you mean …?` with the name most like `given`, put into `form`; "" where none is alike."""
    from difflib import get_close_matches  # errors alone need it

    found = get_close_matches(given, list(known), n=1)
    return f"Did you mean {form.format(found[0])}?" if found else ""


def resolve(target: str, location: str = "") -> Any:
    """The dataclass of a dotted name; ConfigError where it is foreign, absent or no part."""
    if target.split(".")[0] != "edgeopt" and target.split(".")[0] not in _plugin_packages():
        raise ConfigError(
            f"_target_ {target!r} is outside edgeopt",
            location=location,
            hint=f"Name a class under edgeopt., or install a plugin with an entry point in {PLUGIN_GROUP!r}",
        )
    module_name, _, class_name = current(target).rpartition(".")
    try:
        found = getattr(import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"_target_ {target!r} cannot be loaded ({error})", location=location) from error
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise ConfigError(f"_target_ {target!r} is not a part", location=location, hint="Name a dataclass")
    return found


def _plugin_packages() -> set[str]:
    # imported and read for foreign targets alone: both together take a measured child 70 ms and 5 MiB
    from importlib.metadata import entry_points

    return {entry_point.module.split(".")[0] for entry_point in entry_points(group=PLUGIN_GROUP)}


def _coerce(value: Any, annotation: Any, location: str) -> Any:
    """`value` as the type that the field declares, or a ConfigError."""
    origin = get_origin(annotation)
    if origin is typing.Literal:
        if value in get_args(annotation):
            return value
        raise ConfigError(
            f"{value!r} is not allowed", location=location, hint=f"Choose one of: {_listed(get_args(annotation))}"
        )
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
            raise ConfigError(f"{value!r} is not a list", location=location)
        item = get_args(annotation)[0]
        return tuple(_coerce(v, item, f"{location}[{i}]") for i, v in enumerate(value))
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{value!r} is not a mapping", location=location)
        return {name: _coerce(v, get_args(annotation)[1], f"{location}.{name}") for name, v in value.items()}
    if isinstance(value, Mapping) and "_target_" in value:
        return instantiate(value, location)
    if annotation is Any:
        return value
    if isinstance(annotation, type(typing.Protocol)) and not dataclasses.is_dataclass(value):
        raise ConfigError(
            f"{value!r} is no {annotation.__name__.lower()}",
            location=location,
            hint=f"Choose one of the group: {location.rpartition('.')[2]}={value}, or give _target_ and its values",
        )
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(annotation, type) and not isinstance(annotation, type(typing.Protocol)):
        fits = isinstance(value, annotation) and (annotation is bool or not isinstance(value, bool))
        if not fits:
            raise ConfigError(f"{value!r} is not of type {annotation.__name__}", location=location)
    return value


def _listed(values: tuple[Any, ...]) -> str:
    return ", ".join(map(str, values))
