from __future__ import annotations

import math
from typing import Any

import pytest
from support.studies import (
    create_search,
)

from edgeopt.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "location"),
    [
        ({"study": ""}, "study"),
        ({"study": "a/b"}, "study"),
        ({"trials": 0}, "trials"),
        ({"spread": -1}, "spread"),
        ({"refine": -0.1}, "refine"),
        ({"refine": 1.1}, "refine"),
        ({"refine": math.nan}, "refine"),
        ({"stagnation": 0}, "stagnation"),
        ({"time": "0 s"}, "time"),
        ({"time": "3 MiB"}, "time"),
        ({"energy": "much"}, "energy"),
        ({"objectives": {}}, "objectives"),
        ({"trial_timeout_s": 0}, "trial_timeout_s"),
        ({"trial_timeout_s": math.nan}, "trial_timeout_s"),
        ({"lease_s": 0}, "lease_s"),
        ({"parameters": {}}, "search.parameters"),
        ({"enqueue": ({"bits": 5},)}, "search.enqueue"),
    ],
)
def test_invalid_search_is_rejected(values: dict[str, Any], location: str) -> None:
    with pytest.raises(ConfigError) as caught:
        create_search(**values)
    assert caught.value.location.startswith(location)


def test_budgets_are_parsed_with_units() -> None:
    search = create_search(time="2 h", energy="50 kJ")
    assert (search.time_s, search.energy_j) == (7200.0, 50_000.0)
