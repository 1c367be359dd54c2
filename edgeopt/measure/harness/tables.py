"""Convert the samples of measured processes into tables with one row per figure, document or generated text.

A table is `{"columns": [...], "data": [[...], ...]}`, the format of MLflow and of pandas with `orient="split"`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Table = dict[str, list[Any]]


def build_tables(runs: Sequence[Mapping[str, Any]]) -> dict[str, Table]:
    """Return the tables `samples`, `worst_documents` and `generations`, without empty ones.

    `runs` has the format of `runs` in `samples.json`.
    """
    reports = [(number, run["disturbance"], run["report"]["samples"]) for number, run in enumerate(runs)]
    all_samples = [samples for _, _, by_probe in reports for samples in by_probe.values()]
    tables = {
        "samples": _table(
            ["probe", "process", "disturbance", "figure", "number", "value"],
            [
                [probe, process, disturbance, *row]
                for process, disturbance, by_probe in reports
                for probe, samples in by_probe.items()
                for row in _iterate_figures(samples)
            ],
        ),
        "worst_documents": _records_table(samples.get("worst", ()) for samples in all_samples),
        "generations": _records_table(samples.get("texts", ()) for samples in all_samples),
    }
    return {name: table for name, table in tables.items() if table["data"]}


def _iterate_figures(value: Any, name: str = "") -> Iterator[list[Any]]:
    """Yield [name, index, figure] for each number in a probe's samples.

    Integers in lists are skipped: they are counts or token ids.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _iterate_figures(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            if isinstance(item, float):
                yield [name, index, item]
            elif isinstance(item, list):
                yield from _iterate_figures(item, f"{name}.{index}")
    elif isinstance(value, (int, float)):
        yield [name, 0, value]


def _records_table(lists: Iterator[Sequence[Mapping[str, Any]]]) -> Table:
    """Return a table with one row per mapping; all mappings have the same keys."""
    rows = [record for records in lists for record in records]
    return _table(list(rows[0]) if rows else [], [list(row.values()) for row in rows])


def _table(columns: list[Any], data: list[Any]) -> Table:
    return {"columns": columns, "data": data}
