"""What each choice of grid for each matrix would do to a model's predictions, measured once a model.

A sample of a matrix's rows is rounded as the whole would be, for every choice: rounding treats rows apart, so
what the sample loses tells what all rows lose.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.checkpoints import modeling, safetensors_io
from edgeopt.compress.layerwise_forward import LayerwiseForward, lm_head_input_statistic
from edgeopt.compress.quantization.k_quant import KQuant
from edgeopt.compress.quantization.sensitivity import (
    TOKENS,
    curvature,
    predicted_divergence,
    predicted_divergence_of_lookup,
)
from edgeopt.core.config_objects import to_config
from edgeopt.core.model_spec import EMBEDDING, LM_HEAD, UNITS, QuantizationScheme

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from edgeopt.compress.quantization.rounding import Rounding
    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.protocols import CompressionContext

Losses = dict[str, dict[QuantizationScheme, float]]
"""Predicted divergence in nats a token, by unit and grid."""
TABLES = "tables"
"""The item that stands for both tied tables, which share a grid."""
ROWS, LOOKED_UP = 128, 1024
"""Rows of a matrix that are sampled, and of an embedding: the most frequent ones."""


def weigh(
    network: PreTrainedModel,
    checkpoint: Checkpoint,
    choices: Mapping[str, Sequence[QuantizationScheme]],
    rounding: Rounding,
    windows: Sequence[Sequence[int]],
    context: CompressionContext,
    *,
    seed: int,
) -> Losses:
    """Predicted divergence of every choice, from the cache where it was measured before; resumable by layer."""
    measured = [checkpoint.digest, [list(window) for window in windows], seed]
    offered = {item: [to_config(grid) for grid in schemes] for item, schemes in choices.items()}
    inputs = [*measured, to_config(rounding), offered]

    def measure_curvature(directory: Path) -> None:
        found = curvature(network, windows, seed=seed, progress=context.progress)
        safetensors_io.write(found, directory / "curvature.safetensors")

    def measure(directory: Path) -> None:
        means = safetensors_io.read_folder(context.cache.get_or_create("curvature", measured, measure_curvature))
        scale = _Scale(network, choices, rounding, means)
        table: dict[str, list[float]] = {}
        with context.cache.resumable_folder(["sensitivity", inputs]) as draft:
            stream = LayerwiseForward.start(network, windows)
            for number, layer in enumerate(modeling.layers(network)):
                kept = draft / f"layer-{number}.json"
                if not kept.is_file():
                    context.progress(f"weighing the choices of layer {number + 1} of {len(checkpoint.spec.layers)}")
                    _write(kept, {f"layers.{number}.{unit}": scale.unit(stream, number, unit) for unit in UNITS})
                table |= json.loads(kept.read_text())
                stream.advance(layer, number)
        context.progress("weighing the choices of the tables")
        table |= scale.tables(lm_head_input_statistic(network, windows, "hessian"))
        _write(directory / "divergence.json", table)

    folder = context.cache.get_or_create("sensitivity", inputs, measure)
    rows = json.loads((folder / "divergence.json").read_text())
    return {item: dict(zip(schemes, rows[item], strict=True)) for item, schemes in choices.items()}


class _Scale:
    """Weighs the choices of one unit after another."""

    def __init__(
        self,
        network: PreTrainedModel,
        choices: Mapping[str, Sequence[QuantizationScheme]],
        rounding: Rounding,
        means: Mapping[str, Tensor],
    ) -> None:
        self._network, self._choices, self._rounding, self._means = network, choices, rounding, means
        self._modules = modeling.units(network)

    def unit(self, stream: LayerwiseForward, layer: int, unit: str) -> list[float]:
        name = f"layers.{layer}.{unit}"
        first = self._network.get_submodule(self._modules[name][0])
        hessian = stream.input_statistic(modeling.layers(self._network)[layer], layer, first, "hessian")
        return self._matrix(name, self._choices[name], self._rounding, hessian)

    def tables(self, lm_head_input_statistic: Tensor) -> dict[str, list[float]]:
        """As `layerwise` rounds them: an embedding by k-quants, with it a head that is tied to it."""
        if TABLES not in self._choices:
            head = self._matrix(LM_HEAD, self._choices[LM_HEAD], self._rounding, lm_head_input_statistic)
            return {LM_HEAD: head, EMBEDDING: self._lookup(self._choices[EMBEDDING], None)}
        head = self._matrix(LM_HEAD, self._choices[TABLES], KQuant(), lm_head_input_statistic)
        lookup = self._lookup(self._choices[TABLES], lm_head_input_statistic.diagonal())
        return {TABLES: [a + b for a, b in zip(head, lookup, strict=True)]}

    def _matrix(
        self, name: str, schemes: Sequence[QuantizationScheme], rounding: Rounding, hessian: Tensor
    ) -> list[float]:
        import torch

        weight = self._weight(name)
        rows = torch.linspace(0, len(weight) - 1, min(ROWS, len(weight))).long()
        gradient = self._means[name][rows]
        gradient = gradient * (self._means[name].sum() / gradient.sum().clamp(min=1e-30))
        statistic = {"none": None, "second_moment": hessian.diagonal(), "hessian": hessian}[rounding.INPUT_STATISTIC]
        changes = (rounding.round(weight[rows], grid, statistic).weight - weight[rows] for grid in schemes)
        return [predicted_divergence(change, gradient, hessian) for change in changes]

    def _lookup(self, schemes: Sequence[QuantizationScheme], energy: Tensor | None) -> list[float]:
        weight, often = self._weight(EMBEDDING), self._means[TOKENS]
        rows = often.topk(min(LOOKED_UP, len(often))).indices
        frequency = often[rows] / often[rows].sum()
        changes = (KQuant().round(weight[rows], grid, energy).weight - weight[rows] for grid in schemes)
        return [predicted_divergence_of_lookup(change, self._means[EMBEDDING], frequency) for change in changes]

    def _weight(self, name: str) -> Tensor:
        import torch

        parts: list[Any] = [self._network.get_submodule(module).weight.detach() for module in self._modules[name]]
        return torch.cat(parts)


def _write(path: Path, document: object) -> None:
    """Write at once: a kill leaves the whole file or none."""
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps(document) + "\n")
    draft.replace(path)
