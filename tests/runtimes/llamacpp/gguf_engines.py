"""Build GGUF engines for tests and read them back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from support.stages import apply_step, build_engine, predict_metric

from edgeopt.compress.quantization.quantize import Quantize
from edgeopt.core.artifact import Checkpoint, Engine
from edgeopt.runtimes.llamacpp.layout import MODEL_FILE
from edgeopt.runtimes.llamacpp.runtime import LlamaCpp

ALL_INT4 = {"symmetric": True, "lm_head": "int4", "embedding": "int4"}
"""Arguments of Quantize that put the tables into 4 bits, too."""


def quantize(checkpoint: Checkpoint, folder: Path, **values: Any) -> Checkpoint:
    return apply_step(Quantize(**values), checkpoint, folder)


def build(checkpoint: Checkpoint, directory: Path) -> Engine:
    return build_engine(LlamaCpp(), checkpoint, directory)


def read_tensors(engine: Engine) -> dict[str, np.ndarray]:
    """Return every tensor of the GGUF file, dequantized."""
    tensors = gguf.GGUFReader(engine.directory / MODEL_FILE).tensors
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in tensors}


def read_metadata(engine: Engine) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(engine.directory / MODEL_FILE).fields.items()}


def assert_size_was_predicted(engine: Engine, rel: float) -> None:
    """Check that the engine's size is inside the predicted interval and within `rel` of the predicted value."""
    (size,) = predict_metric(LlamaCpp(), engine)
    assert size.low < engine.size_bytes / 2**20 < size.high
    assert size.value == pytest.approx(engine.size_bytes / 2**20, rel=rel)
