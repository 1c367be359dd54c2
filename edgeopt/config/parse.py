"""What a composed config says: its recipe, limits and parts, and where a key of it was written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgeopt.config.compose import Config, choices, compose
from edgeopt.core import units
from edgeopt.core.config_objects import instantiate, resolve
from edgeopt.core.recipe import Recipe
from edgeopt.core.target import Limit
from edgeopt.errors import ConfigError


def known_metrics(config_dir: Path | None = None) -> dict[str, str]:
    """Every metric that some probe of the `probe` group may report, with its unit."""
    every = choices("probe", config_dir=config_dir)
    composed = compose([f"+probe@_edgeopt.{c}={c}" for c in every], config_dir=config_dir, complete=False)
    metrics: dict[str, str] = {}
    for choice in every:
        metrics |= resolve(composed["_edgeopt"][choice]["_target_"], f"probe/{choice}").METRICS
    return metrics


def cache_limit(config: Config) -> int | None:
    """Bytes that the cache may take on disk; None for no limit. ConfigError for a bad quantity."""
    cache = config["cache"]
    if not isinstance(cache, Mapping) or set(cache) != {"limit"}:
        raise ConfigError(f"{cache!r} is no mapping with limit alone", location="cache", hint="Set cache.limit")
    return None if cache["limit"] is None else units.size_bytes(cache["limit"], "cache.limit")


def limits(config: Config, known: Mapping[str, str]) -> tuple[Limit, ...]:
    """The limits of a composed config; ConfigError for an unknown metric or a bad quantity."""
    if not isinstance(config["limits"], Mapping):
        raise ConfigError(f"{config['limits']!r} is no mapping", location="limits", hint="Give quantities by metric")
    return tuple(Limit.parse(metric, text, known) for metric, text in _leaves(config["limits"]) if text is not None)


def recipe(config: Config) -> Recipe:
    """The recipe of a composed config; every step must stand in `order`, once."""
    steps, order = config["step"], config["order"]
    if not isinstance(order, list):
        raise ConfigError(
            f"{order!r} is no list", location="order", hint="Give the names of the steps, as in order=[prune,quantize]"
        )
    for name in order:
        if name not in steps:
            raise ConfigError(
                f"step {name!r} is not configured",
                location="order",
                hint=f"Add it by +step@step.{name}=CHOICE, or take it out of order",
            )
    if len(set(order)) < len(order):
        raise ConfigError("a step stands in it twice", location="order", hint="Give the second one a name of its own")
    for name in steps:
        if name not in order:
            raise ConfigError(
                f"step {name!r} is configured but not part of order {order}",
                location=f"step.{name}",
                hint=f"Add it: order=[{','.join([*order, name])}]",
            )
    return Recipe(model=config["model"], steps=tuple((n, steps[n]) for n in order), runtime=config["runtime"])


def part(config: Config, key: str) -> Any:
    """The part configured under a top-level key."""
    if not isinstance(config.get(key), dict):
        raise ConfigError(f"nothing is configured under {key!r}", location=key, hint=f"Choose one of the group {key}")
    return instantiate(config[key], key)


def written_at(key: str, config_dir: Path) -> str:
    """`file:line` in a user's folder that sets the last part of a dotted key; "" where not just one does."""
    pattern = re.compile(rf"\s*{re.escape(key.rpartition('.')[2])}\s*:")
    found = [
        f"{path}:{number}"
        for path in sorted(config_dir.rglob("*.yaml"))
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        if pattern.match(line)
    ]
    return found[0] if len(found) == 1 else ""


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dots in the keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value
