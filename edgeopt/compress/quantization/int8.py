"""Quantize weights and activations to 8 bits for integer matrix products."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgeopt.checkpoints import modeling
from edgeopt.compress.activations import calibration_windows
from edgeopt.compress.layerwise_forward import LayerwiseForward
from edgeopt.compress.preconditions import require_float, require_positive
from edgeopt.compress.quantization.activation_ranges import affine_parameters, clipping_range
from edgeopt.compress.quantization.layerwise import quantize_unit
from edgeopt.compress.quantization.rtn import Rtn
from edgeopt.core.model_spec import EMBEDDING, LM_HEAD, UNITS, ModelSpec, QuantizationScheme
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from edgeopt.checkpoints.quantized_matrix import QuantizedMatrix
    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.protocols import CompressionContext

TABLE_BLOCK_SIZE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8:
    """Quantize the layers' weights per output channel, and their inputs at run time (W8A8).

    The engine quantizes inputs with the range of each call (`dynamic`) or with a range from calibration text
    (edgeopt.compress.quantization.activation_ranges). lm_head and embedding are weight-only, 8 bits in blocks of 32.

    Attributes:
        ranges: source of the input ranges.
        percentile: upper percentile for `ranges: percentile`; the lower one is 100 minus it.
        symmetric: center calibrated ranges at zero.
        windows, window_tokens: amount of calibration text.
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
                f"`percentile` must be greater than 50 and at most 100, got {self.percentile}",
                location="percentile",
                hint="Use a value such as 99.99",
            )

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """Return `spec` with the 8-bit schemes; raise ConfigError if its weights are already quantized.

        lm_head and embedding stay in float if the hidden size is not a multiple of 32.
        """
        require_float(spec, "int8")
        inputs = "dynamic" if self.ranges == "dynamic" else "static"
        schemes = {
            name: QuantizationScheme(bits=8, block_size=columns, symmetric=True, inputs=inputs)
            for name, (_, columns) in spec.matrices.items()
            if name not in (LM_HEAD, EMBEDDING)
        }
        if spec.hidden_size % TABLE_BLOCK_SIZE == 0:
            table_scheme = QuantizationScheme(bits=8, block_size=TABLE_BLOCK_SIZE, symmetric=True)
            schemes |= dict.fromkeys((LM_HEAD, EMBEDDING), table_scheme)
        return replace(spec, schemes=schemes)

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        """Write the quantized checkpoint, with the calibrated input parameters unless `ranges` is `dynamic`."""
        import torch

        spec, network = self.plan(checkpoint.spec), modeling.load(checkpoint)
        windows = calibration_windows(checkpoint, context.calibration, count=self.windows, length=self.window_tokens)
        forward = LayerwiseForward.start(network, windows) if self.ranges != "dynamic" else None
        module_names = modeling.unit_modules(network)
        quantized: dict[str, QuantizedMatrix] = {}
        input_parameters: dict[str, list[float]] = {}
        for index, layer in enumerate(modeling.layers(network)):
            context.progress(f"quantizing layer {index + 1} of {len(spec.layers)}")
            for unit in UNITS:
                name = f"layers.{index}.{unit}"
                if forward is not None and self.ranges != "dynamic":
                    inputs: list[torch.Tensor] = []
                    forward.for_each_input(layer, index, network.get_submodule(module_names[name][0]), inputs.append)
                    values = torch.cat([tensor.flatten(0, -2) for tensor in inputs])
                    low, high = clipping_range(values, self.ranges, self.percentile)
                    input_parameters[name] = list(affine_parameters(low, high, symmetric=self.symmetric))
                quantized |= quantize_unit(network, module_names[name], spec.schemes[name], Rtn(), None)
            if forward is not None:
                forward.advance(layer, index)
        for name in (EMBEDDING, LM_HEAD):
            if name in spec.schemes and not (name == LM_HEAD and spec.tied_embeddings):
                quantized |= quantize_unit(network, module_names[name], spec.schemes[name], Rtn(), None)
        modeling.save(network, directory, checkpoint, spec, quantized)
        if input_parameters:
            (directory / modeling.INPUT_RANGES).write_text(json.dumps(input_parameters) + "\n")
        return spec
