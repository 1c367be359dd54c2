"""Parse a composed config into a recipe, limits, a cache limit and config objects, and locate keys in files."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.config.compose import Config, choices, compose
from edgeopt.core import units
from edgeopt.core.config_objects import did_you_mean, instantiate, resolve
from edgeopt.core.recipe import Recipe
from edgeopt.core.target import Limit
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from yaml import Node


def known_metrics(config_dir: Path | None = None) -> dict[str, str]:
    """Return the unit of every metric that a probe of the config group `probe` can report."""
    probes = choices("probe", config_dir=config_dir)
    composed = compose([f"+probe@_edgeopt.{p}={p}" for p in probes], config_dir=config_dir, complete=False)
    metrics: dict[str, str] = {}
    for probe in probes:
        metrics |= resolve(composed["_edgeopt"][probe]["_target_"], f"probe/{probe}").METRICS
    return metrics


def cache_limit(config: Config) -> int | None:
    """Return the maximum size of the cache in bytes; None if unlimited. Raises ConfigError for an invalid quantity."""
    cache = config["cache"]
    if not isinstance(cache, Mapping) or set(cache) != {"limit"}:
        raise ConfigError(
            f"`cache` must be a mapping with the single key `limit`, got {cache!r}",
            location="cache",
            hint="Set cache.limit",
        )
    return None if cache["limit"] is None else units.size_bytes(cache["limit"], "cache.limit")


def limits(config: Config, known: Mapping[str, str]) -> tuple[Limit, ...]:
    """Return the limits of a composed config. Raises ConfigError for an unknown metric or an invalid quantity.

    Args:
        known: unit by metric, from `known_metrics`.
    """
    if not isinstance(config["limits"], Mapping):
        raise ConfigError(
            f"`limits` must be a mapping from metrics to quantities, got {config['limits']!r}",
            location="limits",
            hint="Set a limit such as limits.size.engine_mib='3 GiB'",
        )
    return tuple(Limit.parse(metric, text, known) for metric, text in _leaves(config["limits"]) if text is not None)


def recipe(config: Config) -> Recipe:
    """Return the recipe of a composed config. Raises ConfigError unless `order` lists every step exactly once."""
    steps, order = config["step"], config["order"]
    if not isinstance(order, list):
        raise ConfigError(
            f"`order` must be a list of step names, got {order!r}",
            location="order",
            hint="Use a list such as order=[prune,quantize]",
        )
    for name in order:
        if name not in steps:
            hint = f"Add it by +step@step.{name}=CHOICE, or remove it from order"
            raise ConfigError(
                f"step {name!r} is not configured",
                location="order",
                hint=f"{did_you_mean(str(name), steps)} {hint}".strip(),
            )
    if len(set(order)) < len(order):
        raise ConfigError(
            f"`order` must list each step once, got {order}",
            location="order",
            hint="Add a step under a second name to apply it twice",
        )
    for name in steps:
        if name not in order:
            raise ConfigError(
                f"step {name!r} is configured but missing from order {order}",
                location=f"step.{name}",
                hint=f"Add it: order=[{','.join([*order, name])}]",
            )
    return Recipe(model=config["model"], steps=tuple((n, steps[n]) for n in order), runtime=config["runtime"])


def instantiate_group(config: Config, key: str) -> Any:
    """Instantiate the config object under a top-level key. Raises ConfigError if the key is absent or invalid."""
    if not isinstance(config.get(key), dict):
        raise ConfigError(f"nothing is configured under {key!r}", location=key, hint=f"Choose one of the group {key}")
    return instantiate(config[key], key)


def find_key_location(key: str, config_dir: Path, selected: Collection[str] = ()) -> str:
    """Return the `file:line` in the user's folder that sets a dotted key; "" if there is none or more than one.

    A file of a config group has only the last components of the key: step/mine.yaml sets `ratio` of step.prune.ratio.
    The longest match is returned. Among matches of equal length, the stem of the file must be in `selected`.

    Args:
        key: dotted key of the composed config.
        config_dir: the user's folder of configs.
        selected: names of the config and of the choices that overrides select.
    """
    parts = key.replace("/", ".").split(".")
    matches: list[tuple[int, Path, int]] = []
    for path in sorted(config_dir.rglob("*.yaml")):
        for key_parts, line in _key_lines(path):
            if parts[-len(key_parts) :] == key_parts:
                matches.append((len(key_parts), path, line))
    longest = max((length for length, _, _ in matches), default=0)
    locations = [(path, line) for length, path, line in matches if length == longest]
    if len(locations) > 1:
        locations = [(path, line) for path, line in locations if path.stem in selected]
    return "{}:{}".format(*locations[0]) if len(locations) == 1 else ""


def _key_lines(path: Path) -> Iterator[tuple[list[str], int]]:
    """Yield the components and the line of every key of a YAML file; nothing if the file cannot be parsed."""
    import yaml

    try:
        root = yaml.compose(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return  # composing the config reports the error
    if root is not None:
        yield from _nested_keys(root, [])


def _nested_keys(node: Node, prefix: list[str]) -> Iterator[tuple[list[str], int]]:
    from yaml import MappingNode

    if isinstance(node, MappingNode):
        for key, value in node.value:
            parts = [*prefix, *str(key.value).replace("/", ".").split(".")]
            yield parts, key.start_mark.line + 1
            yield from _nested_keys(value, parts)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings, each with its keys joined by slashes."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value
