"""Predict the engine of a recipe by arithmetic, before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from edgeopt.checkpoints import importing
from edgeopt.config import assemble
from edgeopt.core import units
from edgeopt.core.protocols import SupportsBreakdown
from edgeopt.core.result import Measurement
from edgeopt.core.target import Limit
from edgeopt.errors import ConfigError
from edgeopt.pipeline.early_stop import early_stop_verdicts
from edgeopt.pipeline.evaluate import plan
from edgeopt.pipeline.next_steps import suggest_next_step

if TYPE_CHECKING:
    from edgeopt.config.assemble import Request

TIERS = ((100e6, "tiny"), (1e9, "small"), (7e9, "medium"), (float("inf"), "large"))
"""Upper bounds of the number of parameters, with the name of the size class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitCheck:
    """A limit with the predicted value.

    Attributes:
        fits: False if even the best end of the predicted interval exceeds the limit.
    """

    limit: Limit
    predicted: float
    fits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipePrediction:
    """Size, memory and latency predicted for a recipe's engine without building it.

    Attributes:
        parameters: number of weights after compression.
        tier: size class of the compressed model.
        breakdown: bytes by component; empty if the runtime does not predict them.
        predictions: predicted values with the interval in which the measured value is expected.
        limits: limits on predicted metrics.
        next_step: recommendation if the engine does not fit.
    """

    recipe: str
    target: str
    parameters: int
    tier: str
    breakdown: Mapping[str, int]
    predictions: tuple[Measurement, ...]
    limits: tuple[LimitCheck, ...]
    next_step: str

    @property
    def fits(self) -> bool:
        """Return False if a limit is exceeded even by the best end of its prediction."""
        return all(check.fits for check in self.limits)

    def __getitem__(self, metric: str) -> float:
        """Return the predicted value of a metric. Raises KeyError if it is not predicted."""
        return {m.metric: m.value for m in self.predictions}[metric]

    def to_json(self) -> dict[str, Any]:
        """Return the document of `edgeopt predict --json`."""
        return {
            "recipe": self.recipe,
            "target": self.target,
            "method": "predicted by arithmetic, nothing was measured",
            "parameters": self.parameters,
            "tier": self.tier,
            "breakdown": dict(self.breakdown),
            "predictions": {
                m.metric: {"value": m.value, "low": m.low, "high": m.high, "unit": m.unit} for m in self.predictions
            },
            "limits": [
                {
                    "metric": check.limit.metric,
                    "limit": str(check.limit),
                    "unit": check.limit.unit,
                    "predicted": check.predicted,
                    "fits": check.fits,
                }
                for check in self.limits
            ],
            "next_step": self.next_step,
        }

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{escape(m.metric)}</td><td>{escape(units.format_quantity(m.value, m.unit))}</td>"
            f"<td>{m.low:.4g} … {m.high:.4g}</td></tr>"
            for m in self.predictions
        )
        return f"<table><tr><th>predicted</th><th>value</th><th>interval</th></tr>{rows}</table>"


def predict_recipe(request: Request) -> RecipePrediction:
    """Predict the engine of a request's recipe. Raises ConfigError if nothing can be predicted."""
    job = assemble.build_job(request.compose(), request.config_dir)
    folder = job.source.locate()
    planned = plan(job.steps, job.runtime, importing.spec_of(folder))
    runtime, spec = planned.runtime, planned.spec
    copied_bytes = importing.copied_bytes(folder)
    predictions = runtime.predict(spec, job.target, copied_bytes=copied_bytes)
    if not predictions:
        raise ConfigError(
            f"{type(runtime).__name__} cannot predict an engine with these settings",
            location="runtime",
            hint="Measure it: edgeopt run",
        )
    values = {m.metric: m.value for m in predictions}
    checks = tuple(
        LimitCheck(limit=x, predicted=values[x.metric], fits=not early_stop_verdicts(predictions, [x], {}))
        for x in job.limits
        if x.metric in values and x.absolute is not None
    )
    breakdown: Mapping[str, int] = {}
    if isinstance(runtime, SupportsBreakdown):
        breakdown = runtime.breakdown(spec, job.target, copied_bytes=copied_bytes)
    return RecipePrediction(
        recipe=str(job.recipe),
        target=job.target.name,
        parameters=spec.parameters,
        tier=next(name for bound, name in TIERS if spec.parameters < bound),
        breakdown=breakdown,
        predictions=tuple(predictions),
        limits=checks,
        next_step=suggest_next_step(spec),
    )
