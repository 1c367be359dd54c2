"""The table of metrics names all that the probes report, with their units."""

from __future__ import annotations

import re
from pathlib import Path

from edgeopt.config import parse

TABLE = Path(__file__).parents[1] / "conf" / "metrics.md"


def documented() -> dict[str, str]:
    """Metric → unit, of the first table."""
    found = {}
    for name, unit, says in re.findall(r"^\| `([^`]+)` \| ([^|]*)\|(.*)\|$", TABLE.read_text(), re.MULTILINE):
        numbers = re.findall(r"\d+", says) if "{n}" in name else [""]
        found |= {name.replace("{n}", number): unit.strip() for number in numbers}
    return found


def test_every_metric_is_in_the_table_with_its_unit() -> None:
    known = parse.known_metrics(None)
    table = documented()
    assert {name: table.get(name) for name in known} == dict(known)


def test_the_table_names_nothing_that_does_not_exist() -> None:
    own = {"feasible", "pareto_rank", "excess/METRIC"}
    assert documented().keys() - parse.known_metrics(None).keys() == own
