"""What arithmetic says of a recipe before anything is done for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from edgeopt.result import ESTIMATE, TrialResult
from edgeopt.rungs import refusal
from edgeopt.search.parameter import Params
from edgeopt.spec import ModelSpec
from edgeopt.target import Limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What is known of a recipe by arithmetic.

    Attributes:
        result: without figures, but with the predictions; failed where the recipe cannot be planned.
        damage: share of the weights' energy that rounding and removing is expected to lose, before any recovery.
        baseline: what is predicted of the uncompressed model, by metric.
    """

    result: TrialResult
    damage: float = 0.0
    baseline: Mapping[str, float] = field(default_factory=dict)

    def refused(self, limits: Sequence[Limit], bounds: Mapping[str, float]) -> TrialResult | None:
        """The result of a recipe that cannot be planned, or that breaks a limit even at best; else None.

        `bounds` are the limits, in their metrics' units, that were found to hold relative to the baseline.
        """
        if self.result.failure is not None:
            return self.result
        known = [replace(x, absolute=bounds[x.metric]) if x.metric in bounds else x for x in limits]
        verdicts = refusal(self.result.predictions, known, {})
        return replace(self.result, verdicts=verdicts, refused=ESTIMATE) if verdicts else None

    @property
    def figures(self) -> dict[str, float]:
        return {m.metric: m.value for m in self.result.predictions}


Foresee = Callable[[Params], Forecast]


def damage(original: ModelSpec, planned: ModelSpec) -> float:
    """The share of the weights' energy that is expected to be lost.

    A weight that is removed loses all of it. Rounding to b bits in blocks of B loses (2/3) ln(2B) 4^-b, the variance
    of a uniform error over steps of 2/2^b of the largest of B normal weights, sqrt(2 ln 2B) standard deviations.
    """
    sizes = {name: math.prod(sides) for name, sides in planned.matrices.items()}
    whole = sum(math.prod(sides) for sides in original.matrices.values())
    lost: float = max(0, whole - sum(sizes.values()))
    for name, grid in planned.grids.items():
        lost += sizes[name] * min(1.0, 2 / 3 * math.log(2 * grid.block_size) * 4.0**-grid.bits)
    return lost / whole
