"""Check that conf/metrics.md lists exactly the metrics of the probes, with their units."""

from __future__ import annotations

import re
from pathlib import Path

from edgeopt.config import parse

TABLE = Path(__file__).parents[1] / "conf" / "metrics.md"


def documented_units() -> dict[str, str]:
    """Return the documented unit of each metric; `{n}` in a name stands for each number in its description."""
    units = {}
    row = r"^\| `([^`]+)` \| ([^|]*)\|(.*)\|$"
    for name, unit, description in re.findall(row, TABLE.read_text(), re.MULTILINE):
        numbers = re.findall(r"\d+", description) if "{n}" in name else [""]
        units |= {name.replace("{n}", number): unit.strip() for number in numbers}
    return units


def test_every_metric_is_documented_with_its_unit() -> None:
    known = parse.known_metrics(None)
    documented = documented_units()
    assert {name: documented.get(name) for name in known} == dict(known)


def test_documented_metrics_exist() -> None:
    not_from_probes = {"feasible", "pareto_rank", "excess/METRIC"}
    assert documented_units().keys() - parse.known_metrics(None).keys() == not_from_probes
