"""Compare llama.cpp's logits with PyTorch, for every family, quantization and session setting."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args, get_type_hints

import gguf
import numpy as np
import pytest
from support.stages import apply_step

from edgeopt.checkpoints import modeling
from edgeopt.compress.quantization.llama_quantize import LlamaQuantize
from edgeopt.core.artifact import Checkpoint, Engine
from edgeopt.core.model_spec import LLAMA_CPP_BITS
from edgeopt.errors import BuildError
from edgeopt.measure.stats.divergence import relative_error
from edgeopt.runtimes.llamacpp.layout import MODEL_FILE
from edgeopt.runtimes.llamacpp.runtime import LlamaCpp
from runtimes.llamacpp.gguf_engines import ALL_INT4, assert_size_was_predicted, build, quantize, read_tensors
from runtimes.onnx.random_models import import_random_checkpoint, prune_unevenly, torch_logits
from runtimes.test_families import PROMPT

FP32_CACHE = LlamaCpp(keys_values="fp32")
LARGE_CHANNELS, QUERY_WEIGHT = 8, "blk.1.attn_q.weight"

pytestmark = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")


@pytest.fixture(scope="module")
def wide(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Return a Llama whose matrices have complete blocks of 256, and whose first input channels are always large."""
    import torch

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 16, "num_key_value_heads": 16}
    base = import_random_checkpoint(("Llama", sizes), tiny_model, tmp_path_factory.mktemp("wide"))
    network = modeling.load(base)
    with torch.no_grad():
        for layer in modeling.layers(network):
            layer.input_layernorm.weight[:LARGE_CHANNELS] *= 20
    folder = tmp_path_factory.mktemp("large")
    modeling.save(network, folder, base, base.spec)
    return Checkpoint.seal(folder, format=Checkpoint.FORMAT, spec=base.spec, made_by={})


def logits(engine: Engine, runtime: LlamaCpp = FP32_CACHE) -> np.ndarray:
    session = runtime.open(engine, threads=1)
    try:
        return session.logits(PROMPT)
    finally:
        session.close()


@pytest.mark.parametrize(
    "family", ["llama", "llama 3", "mistral", "qwen2", "qwen3", "phi3", "phi4", "granite", "smollm3"]
)
def test_logits_match_torch(family: str, tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = import_random_checkpoint(family, tiny_model, tmp_path)
    assert relative_error(torch_logits(checkpoint), logits(build(checkpoint, tmp_path / "engine"))) < 1e-4


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_gemma_logits_match_torch(family: str, gemma: dict[str, Checkpoint], tmp_path: Path) -> None:
    """Allow a larger error: llama.cpp looks up Gemma's GELU in an fp16 table."""
    engine = build(gemma[family], tmp_path / "engine")
    assert relative_error(torch_logits(gemma[family]), logits(engine)) < 1e-3


def test_varied_layers_match_torch(llama: Checkpoint, tmp_path: Path) -> None:
    pruned = prune_unevenly(llama, tmp_path / "pruned")
    assert relative_error(torch_logits(pruned), logits(build(pruned, tmp_path / "engine"))) < 1e-4


@pytest.mark.parametrize("file_type", get_args(get_type_hints(LlamaQuantize)["file_type"]))
def test_file_type_size_is_predicted(file_type: str, wide: Checkpoint, tmp_path: Path) -> None:
    quantized = apply_step(LlamaQuantize(file_type=file_type, importance=False), wide, tmp_path / "quantized")
    engine = build(quantized, tmp_path / "engine")
    assert_size_was_predicted(engine, 0.25)
    path = engine.directory / MODEL_FILE
    matrices = [tensor for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) == 2]
    bits = 8 * sum(t.n_bytes for t in matrices) / sum(t.n_elements for t in matrices)
    assert bits == pytest.approx(LLAMA_CPP_BITS[file_type], rel=0.25)


def test_importance_reduces_error_of_large_channels(wide: Checkpoint, tmp_path: Path) -> None:
    exact, errors = read_tensors(build(wide, tmp_path / "exact")), {}
    for importance in (True, False):
        step = LlamaQuantize(importance=importance, windows=4, window_tokens=64)
        quantized = apply_step(step, wide, tmp_path / f"{importance}")
        tensors = read_tensors(build(quantized, tmp_path / f"{importance} engine"))
        errors[importance] = np.abs(tensors[QUERY_WEIGHT] - exact[QUERY_WEIGHT])[:, :LARGE_CHANNELS].mean()
    assert errors[True] < 0.9 * errors[False]


@pytest.mark.parametrize(
    "values",
    [{"weights": "int4", **ALL_INT4}, {"weights": "int8", "symmetric": True}, {"weights": "fp16"}],
    ids=["4 bits", "8 bits", "fp16"],
)
def test_quantized_logits_match_torch(values: dict[str, Any], llama: Checkpoint, tmp_path: Path) -> None:
    checkpoint = quantize(llama, tmp_path / "quantized", **values)
    assert relative_error(torch_logits(checkpoint), logits(build(checkpoint, tmp_path / "engine"))) < 0.05


@pytest.mark.parametrize(
    ("values", "bound"),
    [
        ({"prompt_tokens": 7}, 1e-5),
        ({"mapped": False, "repacked": False}, 1e-5),
        ({"keys_values": "fp16"}, 5e-3),
    ],
)
def test_session_settings_preserve_logits(
    values: dict[str, Any], bound: float, llama: Checkpoint, tmp_path: Path
) -> None:
    engine = build(llama, tmp_path / "engine")
    changed = logits(engine, replace(FP32_CACHE, **values))
    assert relative_error(logits(engine), changed) < bound


def test_truncated_file_is_rejected(llama: Checkpoint, tmp_path: Path) -> None:
    engine = build(llama, tmp_path / "engine")
    path = engine.directory / MODEL_FILE
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BuildError, match="failed to load the engine"):
        LlamaCpp().open(engine, threads=1)
