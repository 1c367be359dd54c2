"""How well an engine still predicts held-out text, alone and against the uncompressed baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from edgeopt.checkpoints import tokenizer as tokens
from edgeopt.core.protocols import Samples, Subject
from edgeopt.core.result import Measurement
from edgeopt.errors import ConfigError, MeasureError
from edgeopt.measure.harness.baseline import Baseline, to_float16
from edgeopt.measure.stats.confidence_intervals import (
    bootstrap_clusters,
    bootstrap_ratio,
    expected_shortfall,
    percentile,
)
from edgeopt.measure.stats.divergence import kl_divergence, log_softmax

if TYPE_CHECKING:
    import numpy as np

_WORST = 10
_HOPELESS_NATS = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Perplexity over the evaluation windows, divergence from the baseline, and the tails of both.

    Measured without a `baseline` reference, the engine becomes one: its log-probabilities at the
    first `kl_tokens` predicted positions stay in the scratch folder (2 bytes for each of the
    vocabulary, so 2048 positions of 150 000 tokens take 600 MB).

    Attributes:
        margin_nats: by how much the mean loss of a window's tokens may grow before it counts as regressed.
    """

    METRICS: ClassVar[Mapping[str, str]] = {
        "quality/perplexity": "",
        "quality/perplexity_ratio": "",
        "quality/kl_mean": "nats",
        "quality/kl_p99": "nats",
        "quality/kl_worst_decile": "nats",
        "quality/regressed_share": "",
        "quality/top1_agreement": "",
    }
    GROUP: ClassVar[str] = "quality"
    TIMED: ClassVar[bool] = False
    processes: int = 1
    kl_tokens: int = 2048
    margin_nats: float = 0.1

    def __post_init__(self) -> None:
        for name in ("processes", "kl_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{getattr(self, name)} is too few", location=name, hint="Give 1 or more")
        if not 0 <= self.margin_nats < math.inf:
            raise ConfigError(f"{self.margin_nats} is no margin", location="margin_nats", hint="Give 0 or more")

    def collect(self, subject: Subject) -> Samples:
        """Per window: NLL in nats, tokens predicted and, against a baseline, KL of each position and equal argmaxes."""
        import numpy as np

        windows = subject.documents
        folder = subject.references.get("baseline")
        baseline = Baseline.read(folder, windows) if folder else None
        nll: list[float] = []
        kl: list[list[float]] = []
        same: list[int] = []
        kept: list[np.ndarray] = []
        top1: list[int] = []
        for window in windows:
            predicted = log_softmax(subject.session.logits(window)[:-1])
            nll.append(-float(predicted[range(len(window) - 1), window[1:]].sum(dtype=np.float64)))
            head = predicted[: self.kl_tokens - len(top1)]
            best = [int(token) for token in head.argmax(axis=-1)]
            if folder is None:
                kept.append(to_float16(head))
            elif baseline is not None:
                reference = baseline.log_probabilities(len(top1), len(head))
                kl.append(kl_divergence(reference, head[: len(reference)]).tolist())
                same.append(sum(a == b for a, b in zip(best, baseline.top1[len(top1) :], strict=False)))
            top1 += best
        if folder is None:
            Baseline(nll=nll, top1=top1, array=np.concatenate(kept)).write(subject.scratch, windows)
        return {
            "nll": nll,
            "predicted_tokens": [len(window) - 1 for window in windows],
            "baseline_nll": baseline.nll if baseline else None,
            "kl": [window for window in kl if window],
            "top1_equal": [count for count, window in zip(same, kl, strict=True) if window],
            "worst": worst(subject, nll, baseline.nll if baseline else None),
        }

    def summarize(self, runs: Sequence[Samples]) -> list[Measurement]:
        run = runs[0]
        counts = run["predicted_tokens"]
        how = f"exp(mean NLL), bootstrap over {len(counts)} windows"
        perplexity = self._figure("quality/perplexity", of_perplexity(run["nll"], counts), counts, how)
        return [perplexity, *(self._against_baseline(run) if run["baseline_nll"] else [])]

    def _against_baseline(self, run: Samples) -> list[Measurement]:
        counts = run["predicted_tokens"]
        rise = [own - base for own, base in zip(run["nll"], run["baseline_nll"], strict=True)]
        sizes = [len(window) for window in run["kl"]]
        mean_kl, same = (
            bootstrap_ratio([sum(window) for window in run["kl"]], sizes),
            bootstrap_ratio(run["top1_equal"], sizes),
        )
        p99_kl, worst_kl = (bootstrap_clusters(run["kl"], tail) for tail in (percentile(99), expected_shortfall(90)))
        grown = regressed(rise, counts, self.margin_nats)
        over = f"bootstrap over {len(sizes)} windows"
        return [
            self._figure(
                "quality/perplexity_ratio",
                of_perplexity(rise, counts),
                counts,
                f"to the baseline, paired bootstrap over {len(counts)} windows",
            ),
            self._figure("quality/kl_mean", mean_kl, sizes, f"mean KL(baseline ‖ engine), {over}"),
            self._figure("quality/kl_p99", p99_kl, sizes, f"p99 KL(baseline ‖ engine), {over}"),
            self._figure(
                "quality/kl_worst_decile", worst_kl, sizes, f"mean KL(baseline ‖ engine) of the worst tenth, {over}"
            ),
            self._figure(
                "quality/regressed_share",
                bootstrap_ratio(grown, [1] * len(grown)),
                [1] * len(grown),
                f"share of {len(grown)} windows that lost more than {self.margin_nats:g} nats a token, "
                "bootstrap over them",
            ),
            self._figure("quality/top1_agreement", same, sizes, f"equal argmax with the baseline, {over}"),
        ]

    def _figure(
        self, metric: str, interval: tuple[float, float, float], counts: Sequence[int], method: str
    ) -> Measurement:
        value, low, high = interval
        unit = self.METRICS[metric]
        return Measurement(metric=metric, unit=unit, value=value, low=low, high=high, count=sum(counts), method=method)


def of_perplexity(nll: Sequence[float], counts: Sequence[int]) -> tuple[float, float, float]:
    """(value, low, high) of exp(total NLL / total tokens); MeasureError where no perplexity could express it."""
    value, low, high = bootstrap_ratio(nll, counts)
    if high > _HOPELESS_NATS:
        raise MeasureError(f"{value:.0f} nats a token: the engine does not model the text", hint="Compress less")
    return math.exp(value), math.exp(low), math.exp(high)


def regressed(rise: Sequence[float], counts: Sequence[int], margin_nats: float) -> list[bool]:
    """Whether each window's NLL rose by more than `margin_nats` for each of its predicted tokens."""
    return [more > margin_nats * count for more, count in zip(rise, counts, strict=True)]


def worst(subject: Subject, nll: Sequence[float], baseline_nll: Sequence[float] | None) -> list[dict[str, Any]]:
    """The windows with the highest NLL a token, the worst first, as text."""
    tokenizer = tokens.load(subject.engine.directory)
    lengths = [len(window) - 1 for window in subject.documents]
    order = sorted(range(len(nll)), key=lambda i: nll[i] / lengths[i], reverse=True)
    return [
        {
            "window": i,
            "nll_per_token": nll[i] / lengths[i],
            "baseline_nll_per_token": baseline_nll[i] / lengths[i] if baseline_nll else None,
            "text": tokenizer.decode(subject.documents[i]),
        }
        for i in order[:_WORST]
    ]
