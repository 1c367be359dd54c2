"""Predict a recipe's result by arithmetic, before any work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from edgeopt.core.result import PREDICTION, TrialResult
from edgeopt.core.target import Limit
from edgeopt.pipeline.early_stop import early_stop_verdicts
from edgeopt.search.space.parameter import Params


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Prediction for one recipe.

    Attributes:
        result: result with predictions and without measurements; failed if the recipe cannot be planned.
        expected_error: expected share of the weights' energy that the recipe loses.
        baseline: predicted values of the uncompressed model, by metric.
    """

    result: TrialResult
    expected_error: float = 0.0
    baseline: Mapping[str, float] = field(default_factory=dict)

    def refused_result(self, limits: Sequence[Limit], bounds: Mapping[str, float]) -> TrialResult | None:
        """Return the result of a recipe that cannot satisfy the limits or cannot be planned; None for any other.

        Args:
            limits: limits of the study.
            bounds: bounds of limits in the unit of their metric, for limits relative to a measured baseline.
        """
        if self.result.failure is not None:
            return self.result
        absolute_limits = [replace(x, absolute=bounds[x.metric]) if x.metric in bounds else x for x in limits]
        verdicts = early_stop_verdicts(self.result.predictions, absolute_limits, {})
        return replace(self.result, verdicts=verdicts, refused=PREDICTION) if verdicts else None

    @property
    def metrics(self) -> dict[str, float]:
        """Return predicted values by metric."""
        return {m.metric: m.value for m in self.result.predictions}


PredictTrial = Callable[[Params], Prediction]
"""Function that predicts the result of a recipe in milliseconds."""
