"""What a compressed checkpoint, computed in torch on some of the evaluation windows, tells of its engine's quality.

Torch computes with the very weights that an engine stores. Two things are not known before the engine is measured, and
both widen the intervals: what it rounds beside its weights, and how other windows fare. Where an engine rounds what
torch does not (inputs of matrices in 8 bits, keys and values on a grid), nothing is predicted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from edgeopt.core.model_spec import LLAMA_BITS
from edgeopt.core.result import Measurement
from edgeopt.measure.probes.quality import Quality

if TYPE_CHECKING:
    from edgeopt.core.model_spec import ModelSpec
    from edgeopt.measure.harness.bench import Bench

WINDOWS = 8
"""Evaluation windows that are looked at, spread over the text: of 512 tokens, 4096 in all."""
PERPLEXITY, RATIO, KL = "quality/perplexity", "quality/perplexity_ratio", "quality/kl_mean"
SPREAD = {RATIO: 1.3, KL: 2.6}
"""By which factor an interval is widened, since a percentile bootstrap over n windows is too narrow by t / z *
sqrt(n / (n - 1)) (Hesterberg, The American Statistician 69, 2015): 1.3 for eight. KL is taken at fewer positions, of
four windows as a rule, for which it is 1.9, and the engine's at those of four others, hence sqrt(2) times as much."""
ENGINE_SHARE, ENGINE_NATS = 0.005, 0.002
"""What an engine may differ by from torch in a perplexity, relative, and in a divergence. On the reference model's
4-bit engines, whose products round their inputs to 8 bits by blocks, it was 0.0006 and 0.0004 nats at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityPredictor:
    """Predictions from what `bench` observes: the bench that `shortened` gave, bound to its text and target."""

    metrics: ClassVar[tuple[str, ...]] = (PERPLEXITY, RATIO, KL)
    bench: Any

    def covers(self, spec: ModelSpec) -> bool:
        """Whether an engine of such a model rounds nothing of importance but the weights."""
        in_float = all(grid.inputs == "float" for grid in spec.schemes.values())
        return in_float and spec.kv_cache is None and spec.weight_dtype not in LLAMA_BITS

    def predict(self, observed: Sequence[Measurement], baseline: Mapping[str, float]) -> tuple[Measurement, ...]:
        """The metrics of an engine; of perplexity itself only where the original engine's is known.

        Perplexity is the original engine's times the predicted ratio: windows differ more than what rounding does.
        """
        found = {m.metric: m for m in observed}
        ratio = _widened(found[RATIO], share=ENGINE_SHARE)
        kl = _widened(found[KL], nats=ENGINE_NATS)
        original = baseline.get(PERPLEXITY)
        if original is None:
            return ratio, kl
        perplexity = replace(
            ratio,
            metric=PERPLEXITY,
            value=original * ratio.value,
            low=original * ratio.low,
            high=original * ratio.high,
            method=f"the original engine's, times the ratio: {ratio.method}",
        )
        return perplexity, ratio, kl


def restrict_to_quality(bench: Bench) -> Bench | None:
    """What `Foresight` observes by: the bench's probe of quality alone, on few windows; None where it has none."""
    quality = {name: probe for name, probe in bench.probes.items() if isinstance(probe, Quality)}
    return replace(bench, probes=quality, max_windows=min(bench.max_windows, WINDOWS)) if quality else None


def _widened(figure: Measurement, *, share: float = 0.0, nats: float = 0.0) -> Measurement:
    spread = SPREAD[figure.metric]
    low = figure.value - spread * (figure.value - figure.low)
    high = figure.value + spread * (figure.high - figure.value)
    engine = f"{share:.1%}" if share else f"{nats:g} nats"
    return replace(
        figure,
        low=max(0.0, low * (1 - share) - nats),
        high=high * (1 + share) + nats,
        kind="predicted",
        method=f"{figure.method} in torch, widened {spread:g} times and by {engine} for what the engine rounds",
    )
