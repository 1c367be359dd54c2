"""Compare the definition of a stored study with the definition of a sweep."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_ABSENT = "none"


def describe_changes(stored: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one phrase for each objective, limit and parameter that differs, with the stored and the new value.

    The list is empty if the definitions are equal.

    Args:
        stored: definition of the stored study.
        new: definition of the sweep. Both have the keys `objectives` (pairs of metric and direction), `limits` (pairs
            of metric and text) and `parameters` (a mapping), in plain JSON types.
    """
    changes = [
        *_differences("objective", _by_metric(stored["objectives"]), _by_metric(new["objectives"]), str),
        *_differences("limit", _by_metric(stored["limits"]), _by_metric(new["limits"]), str),
        *_differences("parameter", stored["parameters"], new["parameters"], _to_json),
    ]
    if not changes and stored["objectives"] != new["objectives"]:
        changes = [f"order of objectives: stored {_order(stored)}, new {_order(new)}"]
    return changes


def _differences(
    kind: str, stored: Mapping[str, Any], new: Mapping[str, Any], to_text: Callable[[Any], str]
) -> list[str]:
    def text(values: Mapping[str, Any], name: str) -> str:
        return to_text(values[name]) if name in values else _ABSENT

    names = list(dict.fromkeys([*stored, *new]))
    return [
        f"{kind} {name}: stored {text(stored, name)}, new {text(new, name)}"
        for name in names
        if stored.get(name) != new.get(name)
    ]


def _by_metric(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the text of each metric; an upper and a lower limit of one metric are joined by `and`."""
    texts: dict[str, list[str]] = {}
    for metric, text in pairs:
        texts.setdefault(metric, []).append(text)
    return {metric: " and ".join(parts) for metric, parts in texts.items()}


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _order(definition: Mapping[str, Any]) -> str:
    return ", ".join(metric for metric, _ in definition["objectives"])
