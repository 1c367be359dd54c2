"""Parse a composed config: its recipe, limits, cache size and config objects, and the file and line of a key."""

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
    """Return every metric that a probe of the `probe` group can report, with its unit."""
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
        known: unit by metric, see `known_metrics`.
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
            hint="Write it as order=[prune,quantize]",
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


def written_at(key: str, config_dir: Path, selected: Collection[str] = ()) -> str:
    """Return `file:line` where a file of the user's folder sets a dotted key; "" if it is not unique.

    The file of a config group holds the last components of the key: step/mine.yaml sets `ratio` of step.prune.ratio.
    The longest match wins, then the file whose stem is in `selected`, the choices made by overrides.
    """
    parts = key.replace("/", ".").split(".")
    matches: list[tuple[int, Path, int]] = []
    for path in sorted(config_dir.rglob("*.yaml")):
        for found, line in _key_lines(path):
            if found and parts[-len(found) :] == found:
                matches.append((len(found), path, line))
    longest = max((length for length, _, _ in matches), default=0)
    locations = [(path, line) for length, path, line in matches if length == longest]
    if len(locations) > 1:
        locations = [(path, line) for path, line in locations if path.stem in selected]
    return "{}:{}".format(*locations[0]) if len(locations) == 1 else ""


def _key_lines(path: Path) -> Iterator[tuple[list[str], int]]:
    """Yield every key of a YAML file as its components, with its line; nothing if the file cannot be read."""
    import yaml

    try:
        root = yaml.compose(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return  # composing the config reports it
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
    """Yield the values of nested mappings with their keys joined by slashes."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value
