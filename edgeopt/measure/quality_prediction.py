"""Predict the quality of an engine from its compressed checkpoint, evaluated in PyTorch on a few windows.

PyTorch computes with the same weights that the engine stores. Two errors remain and widen the intervals: the rounding
of the engine outside its weights, and the windows that were not evaluated. For engines with 8-bit activations or a
quantized KV cache nothing is predicted, because PyTorch does not reproduce that rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from edgeopt.core.model_spec import LLAMA_CPP_BITS
from edgeopt.core.result import Measurement
from edgeopt.measure.probes.quality import Quality

if TYPE_CHECKING:
    from edgeopt.core.model_spec import ModelSpec
    from edgeopt.measure.harness.bench import Bench

MAX_WINDOWS = 8
"""Evaluation windows used for a prediction, spread over the text: 4096 tokens at 512 tokens each."""
PERPLEXITY, PERPLEXITY_RATIO, KL_MEAN = "quality/perplexity", "quality/perplexity_ratio", "quality/kl_mean"
INTERVAL_SCALE = {PERPLEXITY_RATIO: 1.3, KL_MEAN: 2.6}
"""Factor by which the interval of each metric is widened.

A percentile bootstrap over n windows is too narrow by t / z sqrt(n / (n - 1)) (Hesterberg, The American Statistician
69, 2015): 1.3 for n = 8. The KL divergence usually covers four windows, for which the factor is 1.9. The engine is
measured on four other windows, which multiplies it by sqrt(2).
"""
ENGINE_RELATIVE_ERROR, ENGINE_KL_NATS = 0.005, 0.002
"""Largest assumed difference between engine and PyTorch: relative for a perplexity, in nats for a divergence.

The 4-bit engines of the reference model, which quantize their activations to 8 bits per block, differ by at most
0.0006 and 0.0004 nats.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityPredictor:
    """Predicts quality metrics of an engine.

    Attributes:
        bench: the bench returned by `restrict_to_quality`, bound to its text and target.
    """

    metrics: ClassVar[tuple[str, ...]] = (PERPLEXITY, PERPLEXITY_RATIO, KL_MEAN)
    bench: Any

    def covers(self, spec: ModelSpec) -> bool:
        """Return whether an engine of this model rounds only its weights."""
        float_inputs = all(scheme.inputs == "float" for scheme in spec.schemes.values())
        return float_inputs and spec.kv_cache is None and spec.weight_dtype not in LLAMA_CPP_BITS

    def predict(self, observed: Sequence[Measurement], baseline: Mapping[str, float]) -> tuple[Measurement, ...]:
        """Return the predicted metrics of the engine.

        The perplexity is the perplexity of the baseline engine times the predicted ratio, because windows differ more
        than rounding does. It is left out if `baseline` has no perplexity.
        """
        by_metric = {m.metric: m for m in observed}
        ratio = _widen(by_metric[PERPLEXITY_RATIO], relative_error=ENGINE_RELATIVE_ERROR)
        kl = _widen(by_metric[KL_MEAN], error_nats=ENGINE_KL_NATS)
        baseline_perplexity = baseline.get(PERPLEXITY)
        if baseline_perplexity is None:
            return ratio, kl
        perplexity = replace(
            ratio,
            metric=PERPLEXITY,
            value=baseline_perplexity * ratio.value,
            low=baseline_perplexity * ratio.low,
            high=baseline_perplexity * ratio.high,
            method=f"perplexity of the baseline engine times the ratio: {ratio.method}",
        )
        return perplexity, ratio, kl


def restrict_to_quality(bench: Bench) -> Bench | None:
    """Return the bench with its quality probes only and at most MAX_WINDOWS windows; None without such a probe."""
    probes = {name: probe for name, probe in bench.probes.items() if isinstance(probe, Quality)}
    return replace(bench, probes=probes, max_windows=min(bench.max_windows, MAX_WINDOWS)) if probes else None


def _widen(figure: Measurement, *, relative_error: float = 0.0, error_nats: float = 0.0) -> Measurement:
    """Scale the interval for the few windows and extend it by the rounding error of the engine."""
    scale = INTERVAL_SCALE[figure.metric]
    low = figure.value - scale * (figure.value - figure.low)
    high = figure.value + scale * (figure.high - figure.value)
    engine_error = f"{relative_error:.1%}" if relative_error else f"{error_nats:g} nats"
    return replace(
        figure,
        low=max(0.0, low * (1 - relative_error) - error_nats),
        high=high * (1 + relative_error) + error_nats,
        kind="predicted",
        method=f"{figure.method} in PyTorch, interval widened {scale:g} times, plus {engine_error} engine rounding",
    )
