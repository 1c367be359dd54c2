"""What ONNX Runtime does to a graph when it opens it, and where less of that is slow, is wrong or does nothing."""

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
def rounded(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """On a grid of 4 bits, with a bias for each product."""
    step = Quantize(weights="int4", bias_correction=True, windows=2, window_tokens=32)
    return apply_step(step, checkpoint, tmp_path_factory.mktemp("rounded") / "checkpoint")


@pytest.fixture(scope="module")
def in_torch(rounded: Checkpoint) -> np.ndarray:
    import torch

    logits: np.ndarray = modeling.load(rounded)(torch.tensor([PROMPT])).logits[0].numpy()
    return logits


@pytest.fixture(scope="module")
def portable(rounded: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return build_engine(PortableOnnx(shards=3), rounded, tmp_path_factory.mktemp("portable") / "engine")


def test_products_of_rounded_weights_are_fused_from_extended_on(portable: Engine, in_torch: np.ndarray) -> None:
    for level, fused in {"none": False, "basic": False, "extended": True, "all": True}.items():
        runtime = PortableOnnx(graph_optimization=level)
        error = relative_error(in_torch, runtime.open(portable, threads=1).logits(PROMPT))
        assert 1e-3 < error < 0.05 if fused else error < 1e-5  # whole numbers are multiplied, or what they stand for
        assert runtime.lint(portable) == (
            [] if fused else [f"graph_optimization={level} dequantizes quantized weights again for each token"]
        )


def test_shards_are_optimized_as_the_whole_is(portable: Engine, in_torch: np.ndarray) -> None:
    runtime = PortableOnnx(shards=3, kv_resident="1 GiB", graph_optimization="none")
    session = runtime.open(portable, threads=1)
    assert relative_error(in_torch, session.logits(PROMPT)) < 1e-5
    session.close()


def test_biases_are_fused_into_the_products_of_genai_from_extended_on(
    rounded: Checkpoint, in_torch: np.ndarray, tmp_path: Path
) -> None:
    engine = build_engine(Genai(), rounded, tmp_path / "engine")
    levels = ("basic", "extended", "all")
    basic, extended, every = (
        Genai(graph_optimization=level).open(engine, threads=1).logits(PROMPT) for level in levels
    )
    assert np.array_equal(extended, every)
    assert not np.array_equal(basic, every)
    assert max(relative_error(in_torch, found) for found in (basic, extended, every)) < 0.05


def test_genai_computes_what_is_constant_beforehand_as_its_products_are_wrong_without() -> None:
    with pytest.raises(ConfigError, match=r"`graph_optimization` must not be none.*Use basic"):
        Genai(graph_optimization="none")


@pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES.keys())
@pytest.mark.parametrize("level", ["basic", "extended"])
def test_a_graph_that_is_stored_as_it_was_optimized_is_not_optimized_less(
    runtime: Genai | PortableOnnx, level: str
) -> None:
    with pytest.raises(ConfigError, match=r"`graph_optimization` must be all .*or packed_on_disk=false"):
        replace(runtime, packed_on_disk=True, graph_optimization=level)
