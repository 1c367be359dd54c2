"""What arithmetic says of a recipe before anything is done for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from edgeopt.core.result import PREDICTION, TrialResult
from edgeopt.core.target import Limit
from edgeopt.pipeline.early_stop import early_stop_verdicts
from edgeopt.search.space.parameter import Params


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What is known of a recipe by arithmetic.

    Attributes:
        result: without figures, but with the predictions; failed where the recipe cannot be planned.
        damage: share of the weights' energy that is expected to be lost.
        baseline: what is predicted of the uncompressed model, by metric.
    """

    result: TrialResult
    expected_error: float = 0.0
    baseline: Mapping[str, float] = field(default_factory=dict)

    def refused(self, limits: Sequence[Limit], bounds: Mapping[str, float]) -> TrialResult | None:
        """The result of a recipe that cannot be planned, or that breaks a limit even at best; else None.

        `bounds` are the limits, in their metrics' units, that were found to hold relative to the baseline.
        """
        if self.result.failure is not None:
            return self.result
        known = [replace(x, absolute=bounds[x.metric]) if x.metric in bounds else x for x in limits]
        verdicts = early_stop_verdicts(self.result.predictions, known, {})
        return replace(self.result, verdicts=verdicts, refused=PREDICTION) if verdicts else None

    @property
    def figures(self) -> dict[str, float]:
        return {m.metric: m.value for m in self.result.predictions}


Foresee = Callable[[Params], Prediction]
