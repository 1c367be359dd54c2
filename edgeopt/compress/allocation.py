"""Which grid each matrix gets under a budget: the multiple-choice knapsack, solved exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

from edgeopt.errors import StepError

Choice = TypeVar("Choice")


def allocate(
    costs: Mapping[str, Mapping[Choice, int]], losses: Mapping[str, Mapping[Choice, float]], budget: int
) -> dict[str, Choice]:
    """One choice for each item, so that the costs add up to `budget` at most and the losses to the least.

    Solved by HiGHS (scipy.optimize.milp). Raises StepError where even the cheapest choices exceed the budget.
    """
    import numpy as np
    from scipy.optimize import LinearConstraint, milp

    least = {item: min(options.values()) for item, options in costs.items()}
    room = budget - sum(least.values())
    if room < 0:
        raise StepError(
            f"the cheapest choices take {sum(least.values())} bytes, more than the budget of {budget}",
            mend="Give a larger budget, or offer fewer bits or larger blocks",
        )
    pairs = [(item, choice) for item, options in costs.items() for choice in options]
    extra = [costs[item][choice] - least[item] for item, choice in pairs]
    unit = math.gcd(*extra) or 1  # small whole numbers keep the solver's tolerance out of the budget
    worst = max(losses[item][choice] for item, choice in pairs) or 1.0
    belongs = np.array([[item == other for other, _ in pairs] for item in costs], dtype=float)
    solved = milp(
        c=np.array([losses[item][choice] / worst for item, choice in pairs]),
        integrality=np.ones(len(pairs)),
        bounds=(0, 1),
        constraints=[
            LinearConstraint(belongs, 1, 1),
            LinearConstraint(np.array([[cost // unit for cost in extra]], dtype=float), -np.inf, room // unit),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if solved.x is None:
        raise StepError(f"the allocation was not solved ({solved.message})")
    return {item: choice for (item, choice), taken in zip(pairs, solved.x, strict=True) if taken > 0.5}
