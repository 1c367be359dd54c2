"""Prune in rounds with retraining after each, while quality stays within a limit."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from edgeopt.checkpoints import importing, modeling
from edgeopt.compress.activations import calibration_windows
from edgeopt.compress.losses import perplexity
from edgeopt.compress.preconditions import require_dense, require_float, require_ratio
from edgeopt.compress.pruning.prune_width import PruneWidth
from edgeopt.compress.recovery.distill import Distill
from edgeopt.compress.recovery.training import Training
from edgeopt.core.artifact import Checkpoint
from edgeopt.core.config_objects import to_config
from edgeopt.core.corpus import Text
from edgeopt.core.protocols import ErrorReducing, Step
from edgeopt.errors import ConfigError, StepError

if TYPE_CHECKING:
    from edgeopt.core.model_spec import ModelSpec
    from edgeopt.core.protocols import CompressionContext

HELD_OUT_INTERVAL = 8
"""Every eighth calibration document is held out from pruning and retraining, to measure quality after each round."""
HELD_OUT_WINDOWS, HELD_OUT_WINDOW_TOKENS = 32, 256
"""Number and length of the windows of held-out text that perplexity is measured on."""


@runtime_checkable
class IterativePruning(Step, Protocol):
    """A pruning step that can reach its result in several rounds."""

    def plan_rounds(self, spec: ModelSpec, round_ratio: float) -> list[ModelSpec]:
        """Return the planned model after each round; the last one equals `plan(spec)`.

        Each round removes about `round_ratio` of `spec`.
        """
        ...

    def prune_to(
        self, checkpoint: Checkpoint, pruned_spec: ModelSpec, directory: Path, context: CompressionContext
    ) -> ModelSpec:
        """Prune like `apply`, but to the total size of `pruned_spec`; return the true spec.

        The distribution of sizes over layers may differ from that of `pruned_spec`.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneGradually:
    """Prune in rounds with retraining after each (arXiv 1906.10771), up to a limit of quality loss.

    Quality is the perplexity on held-out calibration documents, relative to the uncompressed model. Neither pruning
    nor training sees these documents. The first round that exceeds the limit is discarded and ends the step. The
    result is the model of the round before it, which is larger than planned.

    Attributes:
        prune: the pruning step that defines the final size.
        retrain: the training step after each round; its token budget applies to one round.
        round_ratio: share of the original model that one round removes, usually 0.1 to 0.2.
        max_perplexity_ratio: limit of perplexity relative to the uncompressed model; null runs every round.
    """

    prune: IterativePruning = field(default_factory=PruneWidth)
    retrain: Step = field(default_factory=lambda: Distill(tokens=60_000, learning_rate=2.5e-4))
    round_ratio: float = 0.15
    max_perplexity_ratio: float | None = 1.1

    def __post_init__(self) -> None:
        require_ratio(self.round_ratio, "round_ratio")
        if not isinstance(self.prune, IterativePruning):
            raise ConfigError(
                f"`prune` must be a pruning step that supports rounds, got {type(self.prune).__name__}",
                location="prune",
                hint="Use prune_width, prune_heads or prune_depth",
            )
        if not isinstance(self.retrain, Training):
            raise ConfigError(
                f"`retrain` must be a training step, got {type(self.retrain).__name__}",
                location="retrain",
                hint="Use distill or lora",
            )
        if self.max_perplexity_ratio is not None and not self.max_perplexity_ratio > 1.0:
            raise ConfigError(
                f"`max_perplexity_ratio` must be greater than 1, got {self.max_perplexity_ratio}",
                location="max_perplexity_ratio",
                hint="Use a value such as 1.1, or null for no limit",
            )

    @property
    def remaining_error(self) -> float:
        return self.retrain.remaining_error if isinstance(self.retrain, ErrorReducing) else 1.0

    def plan(self, spec: ModelSpec) -> ModelSpec:
        require_float(spec, "prune_gradually")
        require_dense(spec, "prune_gradually")
        pruned_spec = self._plan_rounds(spec)[-1]
        try:
            return self.retrain.plan(pruned_spec)
        except ConfigError as error:
            raise error.at("retrain") from error

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        training_text, held_out_text = _hold_out(context.calibration)
        windows = calibration_windows(checkpoint, held_out_text, count=HELD_OUT_WINDOWS, length=HELD_OUT_WINDOW_TOKENS)
        original_perplexity = perplexity(modeling.load(context.original), windows)
        rounds, accepted, report = self._plan_rounds(checkpoint.spec), checkpoint, []
        for number, pruned_spec in enumerate(rounds, start=1):
            context.progress(f"pruning round {number} of {len(rounds)}")
            candidate = self._run_round(accepted, pruned_spec, replace(context, calibration=training_text))
            ratio = perplexity(modeling.load(candidate), windows) / original_perplexity
            within_limit = self.max_perplexity_ratio is None or ratio <= self.max_perplexity_ratio
            report.append({"parameters": candidate.spec.parameters, "perplexity_ratio": ratio, "kept": within_limit})
            if not within_limit:
                break
            accepted = candidate
        if accepted is checkpoint:
            raise StepError(
                f"The first of {len(rounds)} rounds raised perplexity to {report[0]['perplexity_ratio']:.3f} times "
                f"that of the uncompressed model (limit {self.max_perplexity_ratio:g})",
                location="max_perplexity_ratio",
                hint="Use a smaller round_ratio, more retrain.tokens or a higher limit",
            )
        modeling.link_checkpoint(accepted, directory)
        (directory / "artifacts").mkdir()
        (directory / "artifacts" / "prune_gradually.json").write_text(json.dumps(report, indent=1) + "\n")
        return accepted.spec

    def _plan_rounds(self, spec: ModelSpec) -> list[ModelSpec]:
        try:
            return self.prune.plan_rounds(spec, self.round_ratio)
        except ConfigError as error:
            raise error.at("prune") from error

    def _run_round(self, checkpoint: Checkpoint, pruned_spec: ModelSpec, context: CompressionContext) -> Checkpoint:
        """Prune `checkpoint` to the size of `pruned_spec` and retrain it, or load the round from the cache."""

        def produce(directory: Path) -> None:
            with tempfile.TemporaryDirectory(prefix="edgeopt-pruned-") as folder:
                spec = self.prune.prune_to(checkpoint, pruned_spec, Path(folder), context)
                pruned = Checkpoint.seal(Path(folder), format=Checkpoint.FORMAT, spec=spec, made_by={})
                spec = self.retrain.apply(pruned, directory, context)
            Checkpoint.seal(directory, format=Checkpoint.FORMAT, spec=spec, made_by={})

        inputs = [
            checkpoint.digest,
            context.original.digest,
            context.calibration.digest,
            to_config(self.prune),
            pruned_spec.to_json(),
            importing.step_identity(self.retrain),
        ]
        return Checkpoint.read(context.cache.get_or_create("pruning_round", inputs, produce))


def _hold_out(text: Text) -> tuple[Text, Text]:
    """Split calibration text into documents to prune and train with, and held-out documents to measure quality on."""
    if len(text.documents) < 2:
        raise StepError(
            "The calibration text must have at least 2 documents to hold one out for measuring quality, got 1",
            location="calibration",
            hint="Use text of several documents, such as a .jsonl file",
        )
    interval = min(HELD_OUT_INTERVAL, len(text.documents))
    training = tuple(document for number, document in enumerate(text.documents, start=1) if number % interval)
    held_out = text.documents[interval - 1 :: interval]
    return Text(name=text.name, documents=training), Text(name=text.name, documents=held_out)
