"""Compare two to four trials: different settings, metrics, layers and sample generations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgeopt.core import units
from edgeopt.core.result import Measurement
from edgeopt.pages.sources import Table, Trial

_RECIPE_SECTIONS = ("model", "step", "runtime", "target", "measure")
_TARGET = "_target_"


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricCell:
    """The value of a metric for one trial.

    Attributes:
        interval: the 95 % confidence interval; empty if it has no width.
        ratio: the value divided by the first trial's; None for the first trial, or if one of the two is missing.
        is_significant: True if the interval does not overlap the first trial's.
        method: empty if measured, otherwise `estimated` or `predicted`; ends with `disturbed` for noisy measurements.
    """

    value: str
    interval: str = ""
    ratio: float | None = None
    is_significant: bool = False
    method: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricRow:
    """A metric with the value of the original model and of each trial.

    Attributes:
        original: empty if it is not known, or if the trials have different originals.
    """

    metric: str
    original: str
    cells: tuple[MetricCell, ...]


def different_settings(trials: Sequence[Trial]) -> list[tuple[str, list[str]]]:
    """Return the searched parameters and recipe settings that differ, with the value of each trial.

    The class of a step is shown by its name without the module.
    """
    params = [trial.run.data.params for trial in trials]
    names = [name for name in dict.fromkeys(name for run in params for name in run) if _is_recipe_setting(name)]
    rows = [(name, [run.get(name, "–") for run in params]) for name in names]
    return [_plain_setting(name, values) for name, values in rows if len(set(values)) > 1]


def _is_recipe_setting(name: str) -> bool:
    """Return True for searched parameters, which have no section, and for settings of the recipe's sections."""
    return "." not in name or name.partition(".")[0] in _RECIPE_SECTIONS


def _plain_setting(name: str, values: list[str]) -> tuple[str, list[str]]:
    section, _, field = name.rpartition(".")
    if field != _TARGET:
        return name, values
    return section, [value.rpartition(".")[2] for value in values]


def metric_rows(trials: Sequence[Trial]) -> list[MetricRow]:
    """Return every metric that at least one trial has, with the values of all trials."""
    measurements = [{m.metric: m for m in trial.result.measurements} for trial in trials]
    metrics = dict.fromkeys(metric for trial in measurements for metric in trial)
    return [
        MetricRow(
            metric=metric,
            original=_original(trials, metric, next(t[metric].unit for t in measurements if metric in t)),
            cells=tuple(_cell(trial.get(metric), measurements[0].get(metric)) for trial in measurements),
        )
        for metric in metrics
    ]


def _original(trials: Sequence[Trial], metric: str, unit: str) -> str:
    values = {trial.result.baseline[metric] for trial in trials if metric in trial.result.baseline}
    return units.format_quantity(values.pop(), unit) if len(values) == 1 else ""


def _cell(own: Measurement | None, first: Measurement | None) -> MetricCell:
    if own is None:
        return MetricCell(value="–")
    reference = None if first is own else first
    notes = [own.kind if own.kind != "measured" else "", "disturbed" if own.noisy else ""]
    return MetricCell(
        value=units.format_quantity(own.value, own.unit),
        interval="" if own.low == own.high else f"{own.low:.4g} … {own.high:.4g}",
        ratio=own.value / reference.value if reference is not None and reference.value else None,
        is_significant=reference is not None and (own.low > reference.high or own.high < reference.low),
        method=", ".join(filter(None, notes)),
    )


def layer_rows(trials: Sequence[Trial]) -> list[tuple[str, list[str], bool]]:
    """Return each layer or table, its size and storage format in each trial, and True if they differ."""
    layers = [{row[0]: _layer(trial.layers, row) for row in trial.layers.rows} for trial in trials]
    names = dict.fromkeys(name for trial in layers for name in trial)
    rows = [(name, [trial.get(name, "removed") for trial in layers]) for name in names]
    return [(name, cells, len(set(cells)) > 1) for name, cells in rows]


def _layer(table: Table, row: Sequence[Any]) -> str:
    columns = list(zip(table.columns, row, strict=True))
    sizes = [f"{value} {name}" for name, value in columns[1:4] if value is not None]
    if not sizes:  # an embedding or LM head, whose storage format is in the first column after the sizes
        return str(row[4])
    units_by_format: dict[str, list[str]] = {}
    for name, value in columns[4:]:
        units_by_format.setdefault(value, []).append(name)
    formats = [f"{', '.join(names)}: {value}" for value, names in units_by_format.items() if value]
    return "; ".join([", ".join(sizes), *formats])


def generation_rows(trials: Sequence[Trial]) -> list[tuple[str, str, list[str]]]:
    """Return each prompt, its continuation by the original model, and its continuation by each trial's engine."""
    generations = [{row[0]: row[1:] for row in trial.generations.rows} for trial in trials]
    prompts = dict.fromkeys(prompt for trial in generations for prompt in trial)
    return [
        (
            prompt,
            next((trial[prompt][1] for trial in generations if prompt in trial and trial[prompt][1]), "–"),
            [trial[prompt][0] if prompt in trial else "–" for trial in generations],
        )
        for prompt in prompts
    ]
