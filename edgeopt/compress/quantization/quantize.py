"""Quantize weights to 2, 4 or 8 bits in blocks, or store them in fp16 or fp32."""

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
from edgeopt.compress.quantization.rounding import Rounding, require_sparsity_preserved
from edgeopt.compress.quantization.rtn import Rtn
from edgeopt.core.model_spec import EMBEDDING, LM_HEAD, ModelSpec, QuantizationScheme
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.protocols import CompressionContext

INTEGER_BITS = {"int2": 2, "int4": 4, "int8": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantize:
    """Weight-only quantization: integers of 2, 4 or 8 bits in blocks, or `fp32`/`fp16` without quantization.

    Attributes:
        weights: data type of the layers' matrices.
        block_size: number of weights along the input side that share one scale.
        symmetric: use a constant zero-point instead of one per block.
        lm_head, embedding: data types of the two tables. Tied tables stay tied if both types are equal.
        overrides: data types of single units, by patterns such as `layers.0.*` or `*.qkv`. The last match wins.
            Units are qkv, o, gate_up and down.
        rounding: method that selects codes, scales and zero-points.
        bias_correction: add biases to the layers' matrices that keep the mean of each output. It helps roundings
            without an input statistic most; `gptq` already compensates for the mean.
        windows, window_tokens: amount of calibration text, if `rounding` or `bias_correction` needs any.
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
                f"`block_size` must be one of {', '.join(map(str, BLOCK_SIZES[8]))}; got {self.block_size}",
                location="block_size",
                hint="Use 32 for quality, or 128 for size",
            )
        for name in ("windows", "window_tokens"):
            require_positive(getattr(self, name), name)
        for pattern, dtype in (self.overrides or {}).items():
            if dtype not in ("float", *INTEGER_BITS):
                raise ConfigError(
                    f"the data type must be one of float, {', '.join(INTEGER_BITS)}; got {dtype!r}",
                    location=f"overrides.{pattern}",
                    hint="Use float to leave a unit unquantized",
                )

    @property
    def remaining_error(self) -> float:
        """Return the typical increase of perplexity, as a share of the increase by rounding to nearest."""
        return self.rounding.REMAINING_ERROR

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """Return `spec` with the scheme of every unit.

        Raises:
            ConfigError: the weights are already quantized, `rounding` would change the zeros of a sparse model, a
                pattern matches no unit, or no kernel supports a block size.
        """
        require_float(spec, "quantize")
        require_sparsity_preserved(spec, self.rounding)
        dtypes = self._dtypes(spec)
        schemes = {
            name: QuantizationScheme(
                bits=INTEGER_BITS[dtype],
                block_size=self.block_size,
                symmetric=self.symmetric,
                bias=self.bias_correction and name not in (LM_HEAD, EMBEDDING),
            )
            for name, dtype in dtypes.items()
            if dtype in INTEGER_BITS
        }
        for name, scheme in schemes.items():
            _require_kernel(scheme, spec.matrices[name][1])
        return replace(
            spec,
            weight_dtype="fp16" if self.weights == "fp16" else "fp32",
            schemes=schemes,
            tied_embeddings=spec.tied_embeddings and dtypes[LM_HEAD] == dtypes[EMBEDDING],
        )

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        """Write the quantized checkpoint; without quantization link the files of the original one."""
        spec = self.plan(checkpoint.spec)
        if not spec.schemes:
            modeling.link_checkpoint(checkpoint, directory)
            return spec
        network = modeling.load(checkpoint)
        windows = (
            calibration_windows(checkpoint, context.calibration, count=self.windows, length=self.window_tokens)
            if self.rounding.INPUT_STATISTIC != "none" or self.bias_correction
            else []
        )
        if checkpoint.spec.tied_embeddings and not spec.tied_embeddings:
            modeling.untie(network)
        quantized = quantize_network(network, spec.schemes, self.rounding, windows, context.progress)
        modeling.save(network, directory, checkpoint, spec, quantized)
        return spec

    def _dtypes(self, spec: ModelSpec) -> dict[str, str]:
        """Return the data type of every unit, `float` for unquantized ones."""
        dtypes = dict.fromkeys(spec.matrices, self.weights if self.weights in INTEGER_BITS else "float")
        if self.weights in INTEGER_BITS:
            dtypes |= {LM_HEAD: self.lm_head, EMBEDDING: self.embedding}
        for pattern, dtype in (self.overrides or {}).items():
            matching = [name for name in dtypes if fnmatchcase(name, pattern)]
            if not matching:
                raise ConfigError(
                    f"no unit matches the pattern {pattern!r}",
                    location="overrides",
                    hint=f"Units are layers.0.qkv to layers.{len(spec.layers) - 1}.down, {LM_HEAD} and {EMBEDDING}",
                )
            dtypes |= dict.fromkeys(matching, dtype)
        return dtypes


def _require_kernel(scheme: QuantizationScheme, columns: int) -> None:
    """Raise ConfigError unless the block size divides `columns` and runtimes have a fast kernel for the scheme."""
    supported = BLOCK_SIZES[scheme.bits]
    if columns % scheme.block_size:
        message = f"`block_size` must divide the matrix side {columns}, got {scheme.block_size}"
    elif scheme.block_size not in supported:
        message = f"no runtime has a fast kernel for {scheme.bits} bits in blocks of {scheme.block_size}"
    else:
        return
    dividing = ", ".join(str(block) for block in supported if columns % block == 0)
    hint = f"Use one of {dividing}" if dividing else "Leave these weights unquantized"
    raise ConfigError(message, location="block_size", hint=hint)
