"""Compare the logits of an engine with the logits of its fp32 checkpoint in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from edgeopt.core.config_objects import digest
from edgeopt.core.protocols import ProbeContext, Samples
from edgeopt.core.result import Measurement
from edgeopt.errors import ConfigError, MeasureError
from edgeopt.measure.stats.divergence import kl_divergence, log_softmax, relative_error, top1_agreement

_LOGITS, _WINDOWS = "parity.npy", "parity.sha256"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """Probe of the agreement of an engine's logits with PyTorch, for the base model and each adapter.

    Without a `checkpoint` reference, the logits are written to the scratch folder, which then serves as the reference.

    Attributes:
        processes: number of fresh processes; only the first one counts.
        windows: number of evaluation windows to compare, beginning with the first.
        window_tokens: number of tokens at the start of each window to compare.

    Raises ConfigError for a value below 1.
    """

    METRICS: ClassVar[Mapping[str, str]] = {
        "quality/parity_error": "",
        "quality/parity_kl": "nats",
        "quality/parity_top1": "",
    }
    GROUP: ClassVar[str] = "quality"
    TIMING_SENSITIVE: ClassVar[bool] = False
    processes: int = 1
    windows: int = 4
    window_tokens: int = 64

    def __post_init__(self) -> None:
        for name in ("processes", "windows", "window_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"`{name}` must be at least 1, got {getattr(self, name)}", location=name, hint="Use 1 or more"
                )

    def collect(self, context: ProbeContext) -> Samples:
        """Return the differences from the reference; an empty mapping without a reference.

        Raises MeasureError if the reference was measured on other tokens.
        """
        import numpy as np

        windows = [window[: self.window_tokens] for window in context.documents[: self.windows]]
        adapters = (None, *context.engine.spec.adapters)
        logits = [context.session.logits(window, adapter=name) for name in adapters for window in windows]
        own = np.concatenate(logits).astype(np.float32)
        folder = context.references.get("checkpoint")
        if folder is None:
            np.save(context.scratch / _LOGITS, own)
            (context.scratch / _WINDOWS).write_text(digest(windows))
            return {}
        if not (folder / _LOGITS).is_file():
            return {}
        reference = np.load(folder / _LOGITS)
        if (folder / _WINDOWS).read_text() != digest(windows) or reference.shape != own.shape:
            raise MeasureError(
                "the checkpoint reference must be measured on the same tokens, got other tokens",
                location=str(folder),
                hint="Measure the reference again",
            )
        expected, actual = log_softmax(reference), log_softmax(own)
        return {
            "positions": len(own),
            "error": relative_error(reference, own),
            "kl": float(kl_divergence(expected, actual).mean()),
            "top1": float(top1_agreement(expected, actual).mean()),
        }

    def summarize(self, runs: Sequence[Samples]) -> list[Measurement]:
        """Return the differences, each with an interval of one value; an empty list without a reference."""
        run = runs[0]
        if not run:
            return []
        return [
            self._exact(
                "quality/parity_error", run["error"], run, "max |difference| / max |logit| against PyTorch fp32"
            ),
            self._exact("quality/parity_kl", run["kl"], run, "mean KL(PyTorch fp32 ‖ engine)"),
            self._exact("quality/parity_top1", run["top1"], run, "share of positions with the argmax of PyTorch fp32"),
        ]

    def _exact(self, metric: str, value: float, run: Samples, method: str) -> Measurement:
        return Measurement(
            metric=metric,
            unit=self.METRICS[metric],
            value=value,
            low=value,
            high=value,
            count=run["positions"],
            method=f"{method}, {run['positions']} held-out positions",
        )
