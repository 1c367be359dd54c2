"""Select one of llama.cpp's own weight types; llama.cpp quantizes when the engine is built."""

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
    """Quantize with llama.cpp's llama-imatrix and llama-quantize; requires runtime=llamacpp.

    Attributes:
        file_type: llama.cpp's file type. The types in `M` give some matrices more bits by a rule of llama.cpp.
        importance: weight quantization errors by E[x²] of each input channel on calibration text (importance matrix).
        windows, window_tokens: amount of calibration text.
    """

    file_type: Literal["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_XS", "Q3_K_M", "Q2_K"] = "Q4_K_M"
    importance: bool = True
    windows: int = 32
    window_tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("windows", "window_tokens"):
            require_positive(getattr(self, name), name)

    def plan(self, spec: ModelSpec) -> ModelSpec:
        """Return `spec` with the file type; raise ConfigError if its weights are already quantized or sparse."""
        require_float(spec, "llama_quantize")
        require_dense(spec, "llama_quantize", hint="Remove one of the two steps")
        return replace(spec, weight_dtype=self.file_type)

    def apply(self, checkpoint: Checkpoint, directory: Path, context: CompressionContext) -> ModelSpec:
        """Link the checkpoint's files and write the importance matrix if `importance` is set."""
        spec = self.plan(checkpoint.spec)
        modeling.link_checkpoint(checkpoint, directory)
        if self.importance:
            windows = calibration_windows(
                checkpoint, context.calibration, count=self.windows, length=self.window_tokens
            )
            context.progress(f"computing the importance matrix on {len(windows)} windows")
            second_moments = unit_second_moments(modeling.load(checkpoint), windows)
            path = directory / modeling.IMPORTANCE
            path.parent.mkdir()
            safetensors_io.write({unit: moment.float() for unit, moment in second_moments.items()}, path)
        return spec
