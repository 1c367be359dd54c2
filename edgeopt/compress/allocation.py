"""Which grid each matrix gets under budgets: the multiple-choice knapsack, solved exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

from edgeopt.errors import StepError

Choice = TypeVar("Choice")


def allocate(
    costs: Sequence[Mapping[str, Mapping[Choice, int]]],
    losses: Mapping[str, Mapping[Choice, float]],
    budgets: Sequence[int],
) -> dict[str, Choice]:
    """One choice for each item, so that each of the `costs` adds up to its budget at most and the losses to the least.

    Solved by HiGHS (scipy.optimize.milp). Raises StepError where no choices keep all budgets.
    """
    import numpy as np
    from scipy.optimize import LinearConstraint, milp

    pairs = [(item, choice) for item, options in losses.items() for choice in options]
    limits = [_limit(cost, pairs, budget) for cost, budget in zip(costs, budgets, strict=True)]
    worst = max(losses[item][choice] for item, choice in pairs) or 1.0
    belongs = np.array([[item == other for other, _ in pairs] for item in losses], dtype=float)
    solved = milp(
        c=np.array([losses[item][choice] / worst for item, choice in pairs]),
        integrality=np.ones(len(pairs)),
        bounds=(0, 1),
        constraints=[
            LinearConstraint(belongs, 1, 1),
            *(LinearConstraint(np.array([extra], dtype=float), -np.inf, room) for extra, room in limits),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if solved.x is None:
        raise StepError(f"the allocation was not solved ({solved.message})")
    return {item: choice for (item, choice), taken in zip(pairs, solved.x, strict=True) if taken > 0.5}


def _limit(
    cost: Mapping[str, Mapping[Choice, int]], pairs: Sequence[tuple[str, Choice]], budget: int
) -> tuple[list[int], int]:
    """What each pair costs more than its item's cheapest choice, and the room for that.

    Both in the largest unit that divides them: small whole numbers keep the solver's tolerance out of the budget.
    """
    least = {item: min(options.values()) for item, options in cost.items()}
    room = budget - sum(least.values())
    if room < 0:
        raise StepError(
            f"the cheapest choices take {sum(least.values())}, more than the budget of {budget}",
            hint="Give a larger budget, or offer fewer bits or larger blocks",
        )
    extra = [cost[item][choice] - least[item] for item, choice in pairs]
    unit = math.gcd(*extra) or 1
    return [more // unit for more in extra], room // unit
