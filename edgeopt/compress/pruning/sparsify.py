"""Set the least important weights to zero."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeopt.checkpoints import modeling
from edgeopt.compress.activations import calibration_windows
from edgeopt.compress.layerwise_forward import InputStatistic, LayerwiseForward
from edgeopt.compress.optimal_brain import LAZY_BATCH_COLUMNS, inverse_hessian_cholesky, replace_columns
from edgeopt.compress.preconditions import require_dense, require_float, require_positive, require_ratio
from edgeopt.compress.pruning.wanda import weight_importance
from edgeopt.core.model_spec import EMBEDDING, LM_HEAD, UNITS, ModelSpec
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.protocols import CompressionContext

Pattern = Literal["unstructured", "2:4"]
Method = Literal["magnitude", "wanda", "sparsegpt"]
INPUT_STATISTICS: Mapping[Method, InputStatistic] = {
    "magnitude": "none",
    "wanda": "second_moment",
    "sparsegpt": "hessian",
}
"""Input statistic that each method needs."""
DAMPING = 0.01
"""Multiple of the mean of the Hessian's diagonal that is added to the diagonal, as in GPTQ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparsify:
    """Set weights of the decoder layers to zero, one layer at a time.

    On CPU runtimes this makes the model neither smaller nor faster, because zeros are stored and multiplied like
    other weights. Only TensorRT benefits, with `2:4` on GPUs with sparse tensor cores.

    Attributes:
        pattern: `2:4` sets two of every four weights along the input dimension to zero; `unstructured` chooses
            weights anywhere in a row (sparsegpt: anywhere in a block of 128 columns).
        method: `magnitude` removes the smallest weights; `wanda` those with the least |W| ||x|| (arXiv 2306.11695);
            `sparsegpt` those with the least loss after compensation, and changes the other weights to compensate
            (arXiv 2301.00774).
        ratio: share of zeros; must be 0.5 for 2:4.
        windows, window_tokens: number and length of the calibration windows; `magnitude` uses none.
    """

    pattern: Pattern = "2:4"
    method: Method = "sparsegpt"
    ratio: float = 0.5
    windows: int = 32
    window_tokens: int = 256

    def __post_init__(self) -> None:
        require_ratio(self.ratio, "ratio")
        for name in ("windows", "window_tokens"):
            require_positive(getattr(self, name), name)
        if self.pattern == "2:4" and self.ratio != 0.5:
            raise ConfigError(
                f"`ratio` must be 0.5 for the pattern 2:4, got {self.ratio}",
                location="ratio",
                hint="Use 0.5, or pattern=unstructured",
            )

    def plan(self, spec: ModelSpec) -> ModelSpec:
        require_float(spec, "sparsify")
        require_dense(spec, "a second sparsify", hint="Remove one of the sparsify steps")
        if self.pattern == "2:4":
            columns = {columns for name, (_, columns) in spec.matrices.items() if name not in (LM_HEAD, EMBEDDING)}
            indivisible = [size for size in sorted(columns) if size % 4]
            if indivisible:
                raise ConfigError(
                    f"`pattern` 2:4 requires matrices whose column count is a multiple of 4, got {indivisible[0]}",
                    location="pattern",
                    hint="Use pattern=unstructured",
                )
        return replace(spec, sparsity=self.pattern)

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        spec, network = self.plan(checkpoint.spec), modeling.load(checkpoint)
        statistic_kind, forward = INPUT_STATISTICS[self.method], None
        if statistic_kind != "none":
            windows = calibration_windows(
                checkpoint, context.calibration, count=self.windows, length=self.window_tokens
            )
            forward = LayerwiseForward.start(network, windows)
        modules, zeros = modeling.unit_modules(network), {}
        for index, layer in enumerate(modeling.layers(network)):
            context.progress(f"sparsifying layer {index + 1} of {len(spec.layers)}")
            for unit in UNITS:
                names = modules[f"layers.{index}.{unit}"]
                first = network.get_submodule(names[0])  # all modules of a unit have the same input
                statistic = (
                    forward.input_statistic(layer, index, first, statistic_kind) if forward is not None else None
                )
                for name in names:
                    module: Any = network.get_submodule(name)
                    module.weight.data = self._sparsify_matrix(module.weight.detach(), statistic)
                    zeros[name] = float((module.weight == 0).float().mean())
            if forward is not None:
                forward.advance(layer, index)
        modeling.save(network, directory, checkpoint, spec)
        (directory / "artifacts").mkdir()
        (directory / "artifacts" / "sparsify.json").write_text(json.dumps({"zeros": zeros}, indent=1) + "\n")
        return spec

    def _sparsify_matrix(self, weight: Tensor, statistic: Tensor | None) -> Tensor:
        """Return the sparse weight. `statistic` is the method's entry in `INPUT_STATISTICS`, None for magnitude."""
        if statistic is not None and statistic.ndim == 2:
            return sparsegpt(weight, inverse_hessian_cholesky(statistic, DAMPING), self.pattern, self.ratio)
        scores = weight.abs() if statistic is None else weight_importance(weight, statistic)
        return weight.masked_fill(pruning_mask(scores, self.pattern, self.ratio), 0.0)


def pruning_mask(scores: Tensor, pattern: Pattern, ratio: float) -> Tensor:
    """Return a bool mask of the lowest scores in each row (unstructured) or in each group of four (2:4).

    Args:
        scores: shape (rows, columns), which is also the shape of the mask.
        pattern: `2:4` or `unstructured`.
        ratio: share of the scores that the mask selects.
    """
    import torch

    groups = scores.reshape(-1, 4 if pattern == "2:4" else scores.shape[-1])
    lowest = groups.argsort(dim=-1, stable=True)[:, : round(ratio * groups.shape[-1])]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, lowest, True).reshape(scores.shape)


def sparsegpt(weight: Tensor, factor: Tensor, pattern: Pattern, ratio: float) -> Tensor:
    """Return `weight` with zeros; later columns compensate for their error (SparseGPT, arXiv 2301.00774).

    The score of a weight is its loss after compensation, w_c² / U_cc².

    Args:
        weight: shape (rows, columns).
        factor: Cholesky factor U of the inverse Hessian from `optimal_brain.inverse_hessian_cholesky`.
        pattern: `2:4` or `unstructured`.
        ratio: share of zeros.
    """
    import torch

    squared_diagonal = factor.diagonal().square()
    mask = torch.zeros_like(weight, dtype=torch.bool)
    block = 4 if pattern == "2:4" else LAZY_BATCH_COLUMNS

    def prune_column(column: int, remaining: Tensor) -> Tensor:
        if column % block == 0:
            scores = remaining[:, :block].square() / squared_diagonal[column : column + block]
            mask[:, column : column + block] = pruning_mask(scores.reshape(1, -1), pattern, ratio).reshape(scores.shape)
        return remaining[:, 0].masked_fill(mask[:, column], 0.0)

    return replace_columns(weight, factor, prune_column)
