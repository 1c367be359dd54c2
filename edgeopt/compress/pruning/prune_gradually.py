"""Pruning a little at a time, with retraining between, for as long as quality holds."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

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

JUDGING = 8
"""One in so many calibration documents is kept from pruning and retraining, and judges them."""
WINDOWS, WINDOW_TOKENS = 32, 256
"""How much of them is read."""


class Pruning(Step, Protocol):
    """A step that makes a model smaller, and can do so in parts."""

    def rounds(self, spec: ModelSpec, share: float) -> list[ModelSpec]:
        """Models on the way to `plan(spec)`, which is the last, each by about `share` of `spec` smaller."""
        ...

    def cut(self, checkpoint: Checkpoint, goal: ModelSpec, directory: Path, context: CompressionContext) -> ModelSpec:
        """As `apply`, but down to the sizes of `goal`, which another distribution over layers may reach in sum."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneGradually:
    """Prune in rounds with retraining after each (arXiv 1906.10771), down to a limit of quality.

    Quality is the perplexity on calibration documents that neither pruning nor training sees, as a multiple of the
    uncompressed model's. The first round that exceeds the limit ends the work, and the model before it is the result:
    it is then larger than planned.

    Attributes:
        prune: what is removed in all.
        retrain: what follows each round, with its budget of tokens for one round.
        round_ratio: share of the original that is removed in one round, 0.1 to 0.2 as a rule.
        max_perplexity_ratio: the limit of quality; left open, every round is made.
    """

    prune: Pruning = field(default_factory=PruneWidth)
    retrain: Step = field(default_factory=lambda: Distill(tokens=60_000, learning_rate=2.5e-4))
    round_ratio: float = 0.15
    max_perplexity_ratio: float | None = 1.1

    def __post_init__(self) -> None:
        require_ratio(self.round_ratio, "round_ratio")
        if not hasattr(self.prune, "rounds"):
            raise ConfigError(
                f"{type(self.prune).__name__} does not prune in rounds",
                location="prune",
                hint="Give prune_width, prune_heads or prune_depth",
            )
        if not isinstance(self.retrain, Training):
            raise ConfigError(
                f"{type(self.retrain).__name__} is no training", location="retrain", hint="Give distill or lora"
            )
        if self.max_perplexity_ratio is not None and not self.max_perplexity_ratio > 1.0:
            raise ConfigError(
                f"{self.max_perplexity_ratio} is outside its range",
                location="max_perplexity_ratio",
                hint="Give more than 1, such as 1.1, or null",
            )

    @property
    def remaining_error(self) -> float:
        return self.retrain.remaining_error if isinstance(self.retrain, ErrorReducing) else 1.0

    def plan(self, spec: ModelSpec) -> ModelSpec:
        require_float(spec, "prune_gradually")
        require_dense(spec, "prune_gradually")
        goal = self._rounds(spec)[-1]
        try:
            return self.retrain.plan(goal)
        except ConfigError as error:
            raise error.at("retrain") from error

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        taught, judging = _split(context.calibration)
        windows = calibration_windows(checkpoint, judging, count=WINDOWS, length=WINDOW_TOKENS)
        whole = perplexity(modeling.load(context.original), windows)
        rounds, good, report = self._rounds(checkpoint.spec), checkpoint, []
        for number, goal in enumerate(rounds, start=1):
            context.progress(f"round {number} of {len(rounds)}")
            made = self._round(good, goal, replace(context, calibration=taught))
            ratio = perplexity(modeling.load(made), windows) / whole
            kept = self.max_perplexity_ratio is None or ratio <= self.max_perplexity_ratio
            report.append({"parameters": made.spec.parameters, "perplexity_ratio": ratio, "kept": kept})
            if not kept:
                break
            good = made
        if good is checkpoint:
            raise StepError(
                f"the first round of {len(rounds)} leaves {report[0]['perplexity_ratio']:.3f} times the uncompressed "
                f"model's perplexity, above {self.max_perplexity_ratio:g}",
                location="max_perplexity_ratio",
                hint="Give a smaller round_ratio, more retrain.tokens or a higher limit",
            )
        modeling.link(good, directory)
        (directory / "artifacts").mkdir()
        (directory / "artifacts" / "prune_gradually.json").write_text(json.dumps(report, indent=1) + "\n")
        return good.spec

    def _rounds(self, spec: ModelSpec) -> list[ModelSpec]:
        try:
            return self.prune.rounds(spec, self.round_ratio)
        except ConfigError as error:
            raise error.at("prune") from error

    def _round(self, checkpoint: Checkpoint, goal: ModelSpec, context: CompressionContext) -> Checkpoint:
        """`checkpoint` cut to the size of `goal` and retrained, from the cache where that was done before."""

        def produce(directory: Path) -> None:
            with tempfile.TemporaryDirectory(prefix="edgeopt-pruned-") as folder:
                spec = self.prune.cut(checkpoint, goal, Path(folder), context)
                pruned = Checkpoint.seal(Path(folder), format=Checkpoint.FORMAT, spec=spec, made_by={})
                spec = self.retrain.apply(pruned, directory, context)
            Checkpoint.seal(directory, format=Checkpoint.FORMAT, spec=spec, made_by={})

        inputs = [
            checkpoint.digest,
            context.original.digest,
            context.calibration.digest,
            to_config(self.prune),
            goal.to_json(),
            importing.identity(self.retrain),
        ]
        return Checkpoint.read(context.cache.stage("pruning_round", inputs, produce))


def _split(text: Text) -> tuple[Text, Text]:
    """Calibration text to prune and train with, and text to judge by."""
    if len(text.documents) < 2:
        raise StepError(
            "the calibration text is one document, and none is left to judge rounds by",
            location="calibration",
            hint="Give text of several documents, such as a .jsonl file",
        )
    every = min(JUDGING, len(text.documents))
    taught = tuple(document for number, document in enumerate(text.documents, start=1) if number % every)
    return Text(name=text.name, documents=taught), Text(name=text.name, documents=text.documents[every - 1 :: every])
