"""Predict the KL divergence of every offered quantization scheme for every matrix, once per model.

A sample of each matrix's rows is quantized with every scheme. Rounding treats rows independently, so the error of the
sample represents the error of all rows.
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
    ROW_FREQUENCIES,
    fisher_diagonals,
    predict_divergence,
    predict_embedding_divergence,
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
"""Predicted KL divergence in nats per token, by item and scheme. An item is a unit or TABLES."""
TABLES = "tables"
"""Item of a tied lm_head and embedding, which share one scheme."""
SAMPLED_ROWS, SAMPLED_TOKENS = 128, 1024
"""Number of sampled rows of a matrix, evenly spaced, and of an embedding, the most frequent tokens."""


def predict_losses(
    network: PreTrainedModel,
    checkpoint: Checkpoint,
    choices: Mapping[str, Sequence[QuantizationScheme]],
    rounding: Rounding,
    windows: Sequence[Sequence[int]],
    context: CompressionContext,
    *,
    seed: int,
) -> Losses:
    """Return the predicted divergence of every choice.

    The result is cached. An interrupted sweep resumes after the last complete layer.

    Args:
        choices: offered schemes by item.
        windows: calibration text.
        seed: see `fisher_diagonals`.
    """
    fisher_inputs = [checkpoint.digest, [list(window) for window in windows], seed]
    offered = {item: [to_config(scheme) for scheme in schemes] for item, schemes in choices.items()}
    inputs = [*fisher_inputs, to_config(rounding), offered]

    def produce_fisher(directory: Path) -> None:
        fisher = fisher_diagonals(network, windows, seed=seed, progress=context.progress)
        safetensors_io.write(fisher, directory / "curvature.safetensors")

    def produce(directory: Path) -> None:
        fisher = safetensors_io.read_folder(context.cache.get_or_create("curvature", fisher_inputs, produce_fisher))
        sweep = _SensitivitySweep(network, choices, rounding, fisher)
        table: dict[str, list[float]] = {}
        with context.cache.resumable_folder(["sensitivity", inputs]) as draft:
            forward = LayerwiseForward.start(network, windows)
            for index, layer in enumerate(modeling.layers(network)):
                layer_file = draft / f"layer-{index}.json"
                if not layer_file.is_file():
                    context.progress(f"measuring sensitivity: layer {index + 1} of {len(checkpoint.spec.layers)}")
                    _write(layer_file, {f"layers.{index}.{unit}": sweep.unit(forward, index, unit) for unit in UNITS})
                table |= json.loads(layer_file.read_text())
                forward.advance(layer, index)
        context.progress("measuring sensitivity: lm_head and embedding")
        table |= sweep.tables(lm_head_input_statistic(network, windows, "hessian"))
        _write(directory / "divergence.json", table)

    folder = context.cache.get_or_create("sensitivity", inputs, produce)
    losses = json.loads((folder / "divergence.json").read_text())
    return {item: dict(zip(schemes, losses[item], strict=True)) for item, schemes in choices.items()}


class _SensitivitySweep:
    """Predicts the divergence of every choice, one unit at a time."""

    def __init__(
        self,
        network: PreTrainedModel,
        choices: Mapping[str, Sequence[QuantizationScheme]],
        rounding: Rounding,
        fisher: Mapping[str, Tensor],
    ) -> None:
        self._network, self._choices, self._rounding, self._fisher = network, choices, rounding, fisher
        self._module_names = modeling.unit_modules(network)

    def unit(self, forward: LayerwiseForward, layer_index: int, unit: str) -> list[float]:
        """Return the predicted divergence of each scheme offered for a unit of the current layer."""
        name = f"layers.{layer_index}.{unit}"
        module = self._network.get_submodule(self._module_names[name][0])
        layer = modeling.layers(self._network)[layer_index]
        hessian = forward.input_statistic(layer, layer_index, module, "hessian")
        return self._matrix(name, self._choices[name], self._rounding, hessian)

    def tables(self, lm_head_hessian: Tensor) -> dict[str, list[float]]:
        """Return the predicted divergences of lm_head and embedding, or of TABLES if they are tied.

        Like `quantize_network`, use KQuant for the embedding and for an lm_head that is tied to it.
        """
        if TABLES not in self._choices:
            lm_head = self._matrix(LM_HEAD, self._choices[LM_HEAD], self._rounding, lm_head_hessian)
            return {LM_HEAD: lm_head, EMBEDDING: self._embedding(self._choices[EMBEDDING], None)}
        lm_head = self._matrix(LM_HEAD, self._choices[TABLES], KQuant(), lm_head_hessian)
        embedding = self._embedding(self._choices[TABLES], lm_head_hessian.diagonal())
        return {TABLES: [a + b for a, b in zip(lm_head, embedding, strict=True)]}

    def _matrix(
        self, name: str, schemes: Sequence[QuantizationScheme], rounding: Rounding, hessian: Tensor
    ) -> list[float]:
        """Return the predicted divergence of each scheme from a sample of the rows of a unit."""
        import torch

        weight = self._weight(name)
        rows = torch.linspace(0, len(weight) - 1, min(SAMPLED_ROWS, len(weight))).long()
        fisher = self._fisher[name][rows]
        fisher = fisher * (self._fisher[name].sum() / fisher.sum().clamp(min=1e-30))  # extrapolate to all rows
        statistics = {"none": None, "second_moment": hessian.diagonal(), "hessian": hessian}
        statistic = statistics[rounding.INPUT_STATISTIC]
        changes = (rounding.round(weight[rows], scheme, statistic).weight - weight[rows] for scheme in schemes)
        return [predict_divergence(change, fisher, hessian) for change in changes]

    def _embedding(self, schemes: Sequence[QuantizationScheme], second_moment: Tensor | None) -> list[float]:
        """Return the predicted divergence of each scheme from the rows of the most frequent tokens."""
        weight, frequencies = self._weight(EMBEDDING), self._fisher[ROW_FREQUENCIES]
        rows = frequencies.topk(min(SAMPLED_TOKENS, len(frequencies))).indices
        frequency = frequencies[rows] / frequencies[rows].sum()
        changes = (KQuant().round(weight[rows], scheme, second_moment).weight - weight[rows] for scheme in schemes)
        return [predict_embedding_divergence(change, self._fisher[EMBEDDING], frequency) for change in changes]

    def _weight(self, name: str) -> Tensor:
        """Return the stacked weights of the unit's modules, shape (rows, columns)."""
        import torch

        modules = [self._network.get_submodule(module) for module in self._module_names[name]]
        weights: list[Any] = [module.weight.detach() for module in modules]
        return torch.cat(weights)


def _write(path: Path, document: object) -> None:
    """Write JSON atomically, so that an interrupted process leaves the complete file or none."""
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps(document) + "\n")
    draft.replace(path)
