"""Weights and activations in 8 bits: products of whole numbers, which are fast for long prompts."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgeopt.checkpoints import modeling
from edgeopt.compress.activations import calibration_windows
from edgeopt.compress.layerwise_forward import LayerwiseForward
from edgeopt.compress.preconditions import require_float, require_positive
from edgeopt.compress.quantization.activation_ranges import affine, bounds
from edgeopt.compress.quantization.layerwise import quantize_unit
from edgeopt.compress.quantization.rtn import Rtn
from edgeopt.core.model_spec import EMBEDDING, LM_HEAD, UNITS, ModelSpec, QuantizationScheme
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from edgeopt.checkpoints.quantized_matrix import QuantizedMatrix
    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.protocols import CompressionContext

TABLE_BLOCK = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8:
    """Round the layers' weights by output channel, and their inputs when the engine computes.

    Inputs are rounded with a range taken anew at each call (`dynamic`), or with one that calibration text gave
    (edgeopt.compress.quantization.activation_ranges). Tables stay weight-only, in blocks of 8 bits.

    Attributes:
        ranges: where ranges of inputs come from.
        percentile: for ranges by percentile, the share of values at or below the upper end, in percent.
        symmetric: whether calibrated ranges have their zero in the middle.
    """

    ranges: Literal["dynamic", "min_max", "percentile", "entropy"] = "dynamic"
    percentile: float = 99.99
    symmetric: bool = False
    windows: int = 16
    window_tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("windows", "window_tokens"):
            require_positive(getattr(self, name), name)
        if not 50.0 < self.percentile <= 100.0:
            raise ConfigError(
                f"{self.percentile} is outside its range", location="percentile", hint="Give 50 to 100, such as 99.99"
            )

    def plan(self, spec: ModelSpec) -> ModelSpec:
        require_float(spec, "int8")
        inputs = "dynamic" if self.ranges == "dynamic" else "static"
        schemes = {
            name: QuantizationScheme(bits=8, block_size=columns, symmetric=True, inputs=inputs)
            for name, (_, columns) in spec.matrices.items()
            if name not in (LM_HEAD, EMBEDDING)
        }
        if spec.hidden_size % TABLE_BLOCK == 0:
            table = QuantizationScheme(bits=8, block_size=TABLE_BLOCK, symmetric=True)
            schemes |= dict.fromkeys((LM_HEAD, EMBEDDING), table)
        return replace(spec, schemes=schemes)

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        import torch

        spec, network = self.plan(checkpoint.spec), modeling.load(checkpoint)
        windows = calibration_windows(checkpoint, context.calibration, count=self.windows, length=self.window_tokens)
        stream = LayerwiseForward.start(network, windows) if self.ranges != "dynamic" else None
        modules = modeling.units(network)
        rounded: dict[str, QuantizedMatrix] = {}
        found: dict[str, list[float]] = {}
        for number, layer in enumerate(modeling.layers(network)):
            context.progress(f"rounding layer {number + 1} of {len(spec.layers)}")
            for unit in UNITS:
                name = f"layers.{number}.{unit}"
                if stream is not None and self.ranges != "dynamic":
                    seen: list[torch.Tensor] = []
                    stream.for_each_input(layer, number, network.get_submodule(modules[name][0]), seen.append)
                    low, high = bounds(torch.cat([s.flatten(0, -2) for s in seen]), self.ranges, self.percentile)
                    found[name] = list(affine(low, high, symmetric=self.symmetric))
                rounded |= quantize_unit(network, modules[name], spec.schemes[name], Rtn(), None)
            if stream is not None:
                stream.advance(layer, number)
        for name in (EMBEDDING, LM_HEAD):
            if name in spec.schemes and not (name == LM_HEAD and spec.tied_embeddings):
                rounded |= quantize_unit(network, modules[name], spec.schemes[name], Rtn(), None)
        modeling.save(network, directory, checkpoint, spec, rounded)
        if found:
            (directory / modeling.INPUT_RANGES).write_text(json.dumps(found) + "\n")
        return spec
