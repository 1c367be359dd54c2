"""Weight quantization: matrices are rounded onto grids, which the engine reads as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgeopt.checkpoints import modeling
from edgeopt.checkpoints.quantized_matrix import BLOCK_SIZES
from edgeopt.compress.activations import calibration_windows
from edgeopt.compress.preconditions import require_float, require_positive
from edgeopt.compress.quantization.layerwise import quantize_network
from edgeopt.compress.quantization.rounding import Rounding, require_zeros_kept
from edgeopt.compress.quantization.rtn import Rtn
from edgeopt.core.model_spec import EMBEDDING, LM_HEAD, ModelSpec, QuantizationScheme
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.protocols import CompressionContext

INTEGERS = {"int2": 2, "int4": 4, "int8": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantize:
    """How an engine stores its weights: blocks of 2, 4 or 8 bits, or `fp32`/`fp16` for no quantization.

    Attributes:
        weights: type of the layers' matrices.
        block_size: weights along the input side that share one scale.
        symmetric: whether blocks have no zero-point of their own.
        lm_head, embedding: types of the two tables, stored once where the model ties them and both are alike.
        overrides: other types for single units, by patterns such as `layers.0.*` or `*.qkv`; the last that
            matches counts. Units are qkv, o, gate_up and down.
        rounding: how weights find their place on the grid.
        bias_correction: give the layers' matrices biases that keep the mean of each output. Worth most with roundings
            that do not look at their inputs; `gptq` makes up for the mean by itself.
        windows, window_tokens: how much calibration text is read where `rounding` or `bias_correction` want any.
    """

    weights: Literal["fp32", "fp16", "int8", "int4", "int2"] = "int4"
    block_size: int = 32
    symmetric: bool = False
    lm_head: Literal["float", "int8", "int4"] = "int8"
    embedding: Literal["float", "int8", "int4"] = "int8"
    overrides: Mapping[str, str] | None = None
    rounding: Rounding = field(default_factory=Rtn)
    bias_correction: bool = False
    windows: int = 32
    window_tokens: int = 256

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES[8]:
            raise ConfigError(
                f"{self.block_size} is no block size",
                location="block_size",
                hint=f"Choose one of {', '.join(map(str, BLOCK_SIZES[8]))}",
            )
        for name in ("windows", "window_tokens"):
            require_positive(getattr(self, name), name)
        for pattern, kind in (self.overrides or {}).items():
            if kind not in ("float", *INTEGERS):
                raise ConfigError(
                    f"{kind!r} is no type of weights",
                    location=f"overrides.{pattern}",
                    hint=f"Choose one of float, {', '.join(INTEGERS)}",
                )

    @property
    def remaining_error(self) -> float:
        return self.rounding.REMAINING_ERROR

    def plan(self, spec: ModelSpec) -> ModelSpec:
        require_float(spec, "quantize")
        require_zeros_kept(spec, self.rounding)
        kinds = self._kinds(spec)
        schemes = {
            name: QuantizationScheme(
                bits=INTEGERS[kind],
                block_size=self.block_size,
                symmetric=self.symmetric,
                bias=self.bias_correction and name not in (LM_HEAD, EMBEDDING),
            )
            for name, kind in kinds.items()
            if kind in INTEGERS
        }
        for name, grid in schemes.items():
            _require_kernel(grid, spec.matrices[name][1])
        return replace(
            spec,
            weight_dtype="fp16" if self.weights == "fp16" else "fp32",
            schemes=schemes,
            tied_embeddings=spec.tied_embeddings and kinds[LM_HEAD] == kinds[EMBEDDING],
        )

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        spec = self.plan(checkpoint.spec)
        if not spec.schemes:
            modeling.link(checkpoint, directory)
            return spec
        network = modeling.load(checkpoint)
        windows = (
            calibration_windows(checkpoint, context.calibration, count=self.windows, length=self.window_tokens)
            if self.rounding.INPUT_STATISTIC != "none" or self.bias_correction
            else []
        )
        if checkpoint.spec.tied_embeddings and not spec.tied_embeddings:
            modeling.untie(network)
        rounded = quantize_network(network, spec.schemes, self.rounding, windows, context.progress)
        modeling.save(network, directory, checkpoint, spec, rounded)
        return spec

    def _kinds(self, spec: ModelSpec) -> dict[str, str]:
        """The type of every unit's weights."""
        kinds = dict.fromkeys(spec.matrices, self.weights if self.weights in INTEGERS else "float")
        if self.weights in INTEGERS:
            kinds |= {LM_HEAD: self.lm_head, EMBEDDING: self.embedding}
        for pattern, kind in (self.overrides or {}).items():
            matching = [name for name in kinds if fnmatchcase(name, pattern)]
            if not matching:
                raise ConfigError(
                    f"{pattern!r} matches no unit",
                    location="overrides",
                    hint=f"Units are layers.0.qkv to layers.{len(spec.layers) - 1}.down, {LM_HEAD} and {EMBEDDING}",
                )
            kinds |= dict.fromkeys(matching, kind)
        return kinds


def _require_kernel(grid: QuantizationScheme, columns: int) -> None:
    fitting = ", ".join(str(block) for block in BLOCK_SIZES[grid.bits] if columns % block == 0)
    if columns % grid.block_size:
        wrong = f"a block of {grid.block_size} does not divide the matrix side {columns}"
    elif grid.block_size not in BLOCK_SIZES[grid.bits]:
        wrong = f"runtimes have no fast kernel for {grid.bits} bits in blocks of {grid.block_size}"
    else:
        return
    raise ConfigError(wrong, location="block_size", hint=f"Choose one of {fitting or 'no quantization'}")
