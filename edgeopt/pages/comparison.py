"""Two to four trials side by side: what differs in their recipes, their figures, their layers, and what they write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgeopt.core import units
from edgeopt.core.result import Measurement
from edgeopt.pages.sources import Table, Trial

FEWEST, MOST = 2, 4
_PARTS = ("model", "step", "runtime", "target", "measure")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One trial's figure of a metric.

    Attributes:
        interval: its 95 % confidence interval; empty where it has no width.
        ratio: to the first trial's figure; None for the first, or where one of both is missing or nothing.
        apart: the two intervals do not overlap.
        how: measured, estimated or predicted, and whether something disturbed it.
    """

    value: str
    interval: str = ""
    ratio: float | None = None
    apart: bool = False
    how: str = ""


def settings(trials: Sequence[Trial]) -> list[tuple[str, list[str]]]:
    """Choices and values in which the trials differ, by name, with each one's."""
    every = [trial.run.data.params for trial in trials]
    names = [name for name in dict.fromkeys(name for one in every for name in one) if _of_recipe(name)]
    rows = [(name, [one.get(name, "–") for one in every]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _of_recipe(name: str) -> bool:
    """Whether a param is a choice, or a value of what the choices brought into the recipe."""
    return "." not in name or name.partition(".")[0] in _PARTS


def figures(trials: Sequence[Trial]) -> list[tuple[str, list[Figure]]]:
    """Every metric that one of the trials has, with each one's figure."""
    known = [{m.metric: m for m in trial.result.measurements} for trial in trials]
    metrics = dict.fromkeys(metric for one in known for metric in one)
    return [(metric, [_figure(one.get(metric), known[0].get(metric)) for one in known]) for metric in metrics]


def _figure(own: Measurement | None, first: Measurement | None) -> Figure:
    if own is None:
        return Figure(value="–")
    compared = first is not None and first is not own
    return Figure(
        value=units.format_quantity(own.value, own.unit),
        interval="" if own.low == own.high else f"{own.low:.4g} … {own.high:.4g}",
        ratio=own.value / first.value if compared and first is not None and first.value else None,
        apart=compared and first is not None and (own.low > first.high or own.high < first.low),
        how=own.kind + (", disturbed" if own.noisy else ""),
    )


def layers(trials: Sequence[Trial]) -> list[tuple[str, list[str], bool]]:
    """Every layer or table, how each trial sizes and stores it, and whether they differ."""
    every = [{row[0]: _layer(trial.layers, row) for row in trial.layers["data"]} for trial in trials]
    names = dict.fromkeys(name for one in every for name in one)
    rows = [(name, [one.get(name, "removed") for one in every]) for name in names]
    return [(name, cells, len(set(cells)) > 1) for name, cells in rows]


def _layer(table: Table, row: Sequence[Any]) -> str:
    named = list(zip(table["columns"], row, strict=True))
    sizes = [f"{value} {name}" for name, value in named[1:4] if value is not None]
    alike: dict[str, list[str]] = {}
    for name, value in named[4:]:
        alike.setdefault(value, []).append(name)
    stored = [f"{', '.join(names)}: {value}" for value, names in alike.items() if value]
    if not sizes:  # a table stands in the first of these columns
        return str(row[4])
    return "; ".join([", ".join(sizes), *stored])


def generations(trials: Sequence[Trial]) -> list[tuple[str, str, list[str]]]:
    """Prompts, how the uncompressed model goes on, and how each trial's engine does."""
    every = [{row[0]: row[1:] for row in trial.generations["data"]} for trial in trials]
    prompts = dict.fromkeys(prompt for one in every for prompt in one)
    return [
        (
            prompt,
            next((one[prompt][1] for one in every if prompt in one and one[prompt][1]), "–"),
            [one[prompt][0] if prompt in one else "–" for one in every],
        )
        for prompt in prompts
    ]
