"""Sparsity: single weights become zero where they matter least."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeopt.checkpoints import modeling
from edgeopt.compress.activations import calibration_windows
from edgeopt.compress.layerwise_forward import InputStatistic, LayerwiseForward
from edgeopt.compress.optimal_brain import LAZY_BATCH_COLUMNS, inverse_hessian_cholesky, replace_columns_in_order
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
STATISTICS: Mapping[Method, InputStatistic] = {"magnitude": "none", "wanda": "second_moment", "sparsegpt": "hessian"}
"""What a method wants to know of a matrix's input."""
DAMPING = 0.01
"""As in GPTQ: share of the Hessian's mean diagonal that is added to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparsify:
    """Put single weights of the layers' matrices to zero, one layer after another.

    Nothing becomes smaller or faster by it on the CPU runtimes here: zeros are stored and multiplied like all
    weights. TensorRT alone gains, from `2:4` on GPUs with sparse tensor cores, and from no other pattern.

    Attributes:
        pattern: `2:4` has two zeros in every four weights along the input side, `unstructured` has them anywhere in
            a row (sparsegpt: anywhere in a block of 128 columns).
        method: `magnitude` takes the smallest weights, `wanda` those of the least |W| ||x|| (arXiv 2306.11695),
            `sparsegpt` those whose loss the others best make up for, which they then do (arXiv 2301.00774).
        ratio: share of zeros; one half for 2:4.
        windows, window_tokens: how much calibration text is read, which `magnitude` does without.
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
                f"2:4 makes one half of the weights zero, and not {self.ratio}",
                location="ratio",
                hint="Give 0.5, or pattern=unstructured",
            )

    def plan(self, spec: ModelSpec) -> ModelSpec:
        require_float(spec, "sparsify")
        require_dense(spec, "a second sparsify")
        sides = {columns for name, (_, columns) in spec.matrices.items() if name not in (LM_HEAD, EMBEDDING)}
        uneven = [side for side in sorted(sides) if side % 4]
        if self.pattern == "2:4" and uneven:
            raise ConfigError(
                f"the matrix side {uneven[0]} is no multiple of 4", location="pattern", hint="Choose unstructured"
            )
        return replace(spec, sparsity=self.pattern)

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        spec, network = self.plan(checkpoint.spec), modeling.load(checkpoint)
        kind, stream = STATISTICS[self.method], None
        if kind != "none":
            windows = calibration_windows(
                checkpoint, context.calibration, count=self.windows, length=self.window_tokens
            )
            stream = LayerwiseForward.start(network, windows)
        modules, zeros = modeling.units(network), {}
        for number, layer in enumerate(modeling.layers(network)):
            context.progress(f"sparsifying layer {number + 1} of {len(spec.layers)}")
            for unit in UNITS:
                names = modules[f"layers.{number}.{unit}"]
                first = network.get_submodule(names[0])
                statistic = stream.input_statistic(layer, number, first, kind) if stream is not None else None
                for name in names:
                    module: Any = network.get_submodule(name)
                    module.weight.data = self._sparse(module.weight.detach(), statistic)
                    zeros[name] = float((module.weight == 0).float().mean())
            if stream is not None:
                stream.advance(layer, number)
        modeling.save(network, directory, checkpoint, spec)
        (directory / "artifacts").mkdir()
        (directory / "artifacts" / "sparsify.json").write_text(json.dumps({"zeros": zeros}, indent=1) + "\n")
        return spec

    def _sparse(self, weight: Tensor, statistic: Tensor | None) -> Tensor:
        if statistic is not None and statistic.ndim == 2:
            return sparsegpt(weight, inverse_hessian_cholesky(statistic, DAMPING), self.pattern, self.ratio)
        scores = weight.abs() if statistic is None else weight_importance(weight, statistic)
        return weight.masked_fill(least(scores, self.pattern, self.ratio), 0.0)


def least(scores: Tensor, pattern: Pattern, ratio: float) -> Tensor:
    """Where the least scores of each row, or of each four in a row, lie: bool in the shape (rows, columns)."""
    import torch

    groups = scores.reshape(-1, 4 if pattern == "2:4" else scores.shape[-1])
    lowest = groups.argsort(dim=-1, stable=True)[:, : round(ratio * groups.shape[-1])]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, lowest, True).reshape(scores.shape)


def sparsegpt(weight: Tensor, factor: Tensor, pattern: Pattern, ratio: float) -> Tensor:
    """`weight`, (rows, columns), with zeros that the columns after them make up for.

    A weight's score is its loss when these columns have made up for it, w_c² / U_cc², with U the `factor` of the
    inverse Hessian that edgeopt.compress.optimal_brain.inverse_hessian_cholesky gives.
    """
    import torch

    costs = factor.diagonal().square()
    removed = torch.zeros_like(weight, dtype=torch.bool)

    width = 4 if pattern == "2:4" else LAZY_BATCH_COLUMNS

    def choose(number: int, ahead: Tensor) -> Tensor:
        if number % width == 0:
            scores = ahead[:, :width].square() / costs[number : number + width]
            removed[:, number : number + width] = least(scores.reshape(1, -1), pattern, ratio).reshape(scores.shape)
        return ahead[:, 0].masked_fill(removed[:, number], 0.0)

    return replace_columns_in_order(weight, factor, choose)
