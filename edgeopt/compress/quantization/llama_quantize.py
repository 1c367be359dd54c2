"""Weights in llama.cpp's own types, which it rounds by itself when an engine is built."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgeopt.checkpoints import modeling, safetensors_io
from edgeopt.compress.activations import calibration_windows, unit_second_moments
from edgeopt.compress.preconditions import require_dense, require_float, require_positive
from edgeopt.core.model_spec import ModelSpec

if TYPE_CHECKING:
    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.protocols import CompressionContext


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaQuantize:
    """What llama.cpp's llama-quantize does with a model in float, and its llama-imatrix before: for runtime=llamacpp.

    Attributes:
        file_type: which types the matrices get; those of `M` give some of them, by a rule of llama.cpp's, more bits.
        importance: errors are weighted with the energy of each input channel over calibration text, its importance
            matrix.
        windows, window_tokens: how much of that text is read.
    """

    file_type: Literal["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_XS", "Q3_K_M", "Q2_K"] = "Q4_K_M"
    importance: bool = True
    windows: int = 32
    window_tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("windows", "window_tokens"):
            require_positive(getattr(self, name), name)

    def plan(self, spec: ModelSpec) -> ModelSpec:
        require_float(spec, "llama_quantize")
        require_dense(spec, "llama_quantize", hint="Leave one of the two out")
        return replace(spec, weight_dtype=self.file_type)

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        spec = self.plan(checkpoint.spec)
        modeling.link(checkpoint, directory)
        if self.importance:
            windows = calibration_windows(
                checkpoint, context.calibration, count=self.windows, length=self.window_tokens
            )
            context.progress(f"reading {len(windows)} calibration windows")
            energy = unit_second_moments(modeling.load(checkpoint), windows)
            path = directory / modeling.IMPORTANCE
            path.parent.mkdir()
            safetensors_io.write({unit: mean.float() for unit, mean in energy.items()}, path)
        return spec
