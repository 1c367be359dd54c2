"""Test the graph optimization levels: accuracy, lint findings and rejected combinations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.stages import apply_step, build_engine

from edgeopt.checkpoints import modeling
from edgeopt.compress.quantization.quantize import Quantize
from edgeopt.core.artifact import Checkpoint, Engine
from edgeopt.errors import ConfigError
from edgeopt.measure.stats.divergence import relative_error
from edgeopt.runtimes.genai.runtime import Genai
from edgeopt.runtimes.onnx.runtime import PortableOnnx

RUNTIMES = {"genai": Genai(), "onnx": PortableOnnx()}
PROMPT = [2 + 7 * i % 290 for i in range(40)]


@pytest.fixture(scope="module")
def quantized(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Return the model quantized to 4 bits, with corrected biases."""
    step = Quantize(weights="int4", bias_correction=True, windows=2, window_tokens=32)
    return apply_step(step, checkpoint, tmp_path_factory.mktemp("quantized") / "checkpoint")


@pytest.fixture(scope="module")
def torch_logits(quantized: Checkpoint) -> np.ndarray:
    import torch

    logits: np.ndarray = modeling.load(quantized)(torch.tensor([PROMPT])).logits[0].numpy()
    return logits


@pytest.fixture(scope="module")
def onnx_engine(quantized: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return build_engine(PortableOnnx(shards=3), quantized, tmp_path_factory.mktemp("portable") / "engine")


def test_extended_level_fuses_quantized_products(onnx_engine: Engine, torch_logits: np.ndarray) -> None:
    for level, fused in {"none": False, "basic": False, "extended": True, "all": True}.items():
        runtime = PortableOnnx(graph_optimization=level)
        error = relative_error(torch_logits, runtime.open(onnx_engine, threads=1).logits(PROMPT))
        assert 1e-3 < error < 0.05 if fused else error < 1e-5  # fused products multiply integers
        assert runtime.lint(onnx_engine) == (
            [] if fused else [f"graph_optimization={level} dequantizes quantized weights again for each token"]
        )


def test_level_applies_to_shards(onnx_engine: Engine, torch_logits: np.ndarray) -> None:
    runtime = PortableOnnx(shards=3, kv_resident="1 GiB", graph_optimization="none")
    session = runtime.open(onnx_engine, threads=1)
    assert relative_error(torch_logits, session.logits(PROMPT)) < 1e-5
    session.close()


def test_extended_level_fuses_biases_of_genai(quantized: Checkpoint, torch_logits: np.ndarray, tmp_path: Path) -> None:
    engine = build_engine(Genai(), quantized, tmp_path / "engine")
    levels = ("basic", "extended", "all")
    basic, extended, full = (Genai(graph_optimization=level).open(engine, threads=1).logits(PROMPT) for level in levels)
    assert np.array_equal(extended, full)
    assert not np.array_equal(basic, full)
    assert max(relative_error(torch_logits, logits) for logits in (basic, extended, full)) < 0.05


def test_genai_rejects_unoptimized_graphs() -> None:
    with pytest.raises(ConfigError, match=r"`graph_optimization` must not be none.*Use basic"):
        Genai(graph_optimization="none")


@pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES.keys())
@pytest.mark.parametrize("level", ["basic", "extended"])
def test_prepacked_engine_rejects_lower_levels(runtime: Genai | PortableOnnx, level: str) -> None:
    with pytest.raises(ConfigError, match=r"`graph_optimization` must be all .*or packed_on_disk=false"):
        replace(runtime, packed_on_disk=True, graph_optimization=level)
