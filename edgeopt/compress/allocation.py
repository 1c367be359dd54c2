"""Choose one option for each item within budgets by solving a multiple-choice knapsack problem exactly."""

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
    """Return the choice for each item that minimizes the total loss within all budgets.

    HiGHS solves the integer program exactly (scipy.optimize.milp).

    Args:
        costs: one table per budget; `costs[k][item][choice]` counts towards `budgets[k]`.
        losses: `losses[item][choice]` is the loss of this choice.
        budgets: upper bound of each total cost.

    Raises:
        StepError: no combination of choices fits all budgets.
    """
    import numpy as np
    from scipy.optimize import LinearConstraint, milp

    pairs = [(item, choice) for item, options in losses.items() for choice in options]
    limits = [_excess_costs(cost, pairs, budget) for cost, budget in zip(costs, budgets, strict=True)]
    largest_loss = max(losses[item][choice] for item, choice in pairs) or 1.0
    membership = np.array([[item == other for other, _ in pairs] for item in losses], dtype=float)
    solution = milp(
        c=np.array([losses[item][choice] / largest_loss for item, choice in pairs]),
        integrality=np.ones(len(pairs)),
        bounds=(0, 1),
        constraints=[
            LinearConstraint(membership, 1, 1),
            *(LinearConstraint(np.array([excess], dtype=float), -np.inf, slack) for excess, slack in limits),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if solution.x is None:
        raise StepError(f"the solver found no allocation within the budgets ({solution.message})")
    return {item: choice for (item, choice), selected in zip(pairs, solution.x, strict=True) if selected > 0.5}


def _excess_costs(
    cost: Mapping[str, Mapping[Choice, int]], pairs: Sequence[tuple[str, Choice]], budget: int
) -> tuple[list[int], int]:
    """Return each pair's cost above its item's cheapest choice, and the budget that remains for these excesses.

    Both are divided by the greatest common divisor of the excesses: with small integers, a solution cannot exceed the
    budget within the solver's tolerance.

    Raises:
        StepError: the cheapest choices exceed the budget.
    """
    cheapest = {item: min(options.values()) for item, options in cost.items()}
    slack = budget - sum(cheapest.values())
    if slack < 0:
        raise StepError(
            f"the budget must be at least the cost of the cheapest choices, {sum(cheapest.values())}, got {budget}"
        )
    excess = [cost[item][choice] - cheapest[item] for item, choice in pairs]
    divisor = math.gcd(*excess) or 1
    return [value // divisor for value in excess], slack // divisor
