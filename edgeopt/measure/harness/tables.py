"""What single processes reported, as tables that people read: one row a figure, a document or a text.

A table is `{"columns": [...], "data": [[...], ...]}`, which MLflow and pandas (`orient="split"`) show as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Table = dict[str, list[Any]]


def tables(runs: Sequence[Mapping[str, Any]]) -> dict[str, Table]:
    """Those of `samples`, `worst_documents` and `generations` that have rows; `runs` as in `samples.json`."""
    reports = [(number, run["disturbance"], run["report"]["samples"]) for number, run in enumerate(runs)]
    every = [samples for _, _, by_probe in reports for samples in by_probe.values()]
    found = {
        "samples": _table(
            ["probe", "process", "disturbance", "figure", "number", "value"],
            [
                [probe, process, disturbance, *row]
                for process, disturbance, by_probe in reports
                for probe, samples in by_probe.items()
                for row in _figures(samples)
            ],
        ),
        "worst_documents": _records(samples.get("worst", ()) for samples in every),
        "generations": _records(samples.get("texts", ()) for samples in every),
    }
    return {name: table for name, table in found.items() if table["data"]}


def _figures(value: Any, name: str = "") -> Iterator[list[Any]]:
    """[name, place in its list, figure] of a probe's samples: numbers, and those in lists that are no counts or ids."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _figures(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            if isinstance(item, float):
                yield [name, number, item]
            elif isinstance(item, list):
                yield from _figures(item, f"{name}.{number}")
    elif isinstance(value, (int, float)):
        yield [name, 0, value]


def _records(lists: Iterator[Sequence[Mapping[str, Any]]]) -> Table:
    """Mappings with the same keys as rows."""
    rows = [record for records in lists for record in records]
    return _table(list(rows[0]) if rows else [], [list(row.values()) for row in rows])


def _table(columns: list[Any], data: list[Any]) -> Table:
    return {"columns": columns, "data": data}
