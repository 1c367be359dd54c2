"""Test GGUF files: metadata, tokenizer and exact weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeopt.checkpoints import modeling, quantized_matrix, safetensors_io
from edgeopt.core.artifact import Checkpoint
from edgeopt.errors import BuildError
from runtimes.llamacpp.gguf_engines import (
    ALL_INT4,
    assert_size_was_predicted,
    build,
    quantize,
    read_metadata,
    read_tensors,
)


def with_config(checkpoint: Checkpoint, folder: Path, **values: Any) -> Checkpoint:
    """Return a copy of the checkpoint with other values in its `config.json`."""
    folder.mkdir()
    modeling.link_checkpoint(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    return Checkpoint.seal(folder, format=Checkpoint.FORMAT, spec=checkpoint.spec, made_by={})


def test_metadata_contains_sizes(llama: Checkpoint, tmp_path: Path) -> None:
    metadata = read_metadata(build(llama, tmp_path / "engine"))
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.block_count"] == 3
    assert metadata["llama.feed_forward_length"] == 128
    assert metadata["llama.attention.head_count"] == 4
    assert metadata["llama.attention.head_count_kv"] == 2
    assert metadata["llama.rope.dimension_count"] == 16


def test_metadata_contains_tokenizer(llama: Checkpoint, tmp_path: Path) -> None:
    metadata = read_metadata(build(llama, tmp_path / "engine"))
    document = json.loads((llama.directory / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    tokens = metadata["tokenizer.ggml.tokens"]
    assert {token: tokens.index(token) for token in vocabulary} == vocabulary
    assert len(tokens) == llama.spec.vocabulary_size
    assert len(metadata["tokenizer.ggml.merges"]) == len(document["model"]["merges"])
    control = [tokens[n] for n, kind in enumerate(metadata["tokenizer.ggml.token_type"]) if kind == 3]
    assert control == ["<s>", "</s>"]


@pytest.mark.parametrize(
    ("values", "tolerance"),
    [
        ({"weights": "int4", **ALL_INT4}, 0.0),
        ({"weights": "int8", "symmetric": True}, 0.0),
        ({"weights": "int4", "lm_head": "int4", "embedding": "int4"}, 2**-11),
    ],
    ids=["4 bits", "8 bits", "4 bits with zero-points"],
)
def test_quantized_weights_equal_checkpoint(
    values: dict[str, Any], tolerance: float, llama: Checkpoint, tmp_path: Path
) -> None:
    checkpoint = quantize(llama, tmp_path / "quantized", **values)
    engine = build(checkpoint, tmp_path / "engine")
    assert_size_was_predicted(engine, 0.1)
    tensors = read_tensors(engine)
    state = quantized_matrix.dequantize(safetensors_io.read_folder(checkpoint.directory))
    largest = max(float(tensor.abs().max()) for tensor in state.values())
    for name, module in (("ffn_down", "mlp.down_proj"), ("attn_v", "self_attn.v_proj"), ("ffn_up", "mlp.up_proj")):
        expected = state[f"model.layers.1.{module}.weight"].numpy()
        assert np.abs(tensors[f"blk.1.{name}.weight"] - expected).max() <= tolerance * largest
    assert np.abs(tensors["token_embd.weight"] - state["model.embed_tokens.weight"].numpy()).max() <= largest / 2048


def test_query_and_key_channels_are_interleaved(llama: Checkpoint, tmp_path: Path) -> None:
    tensors = read_tensors(build(llama, tmp_path / "engine"))
    state = safetensors_io.read_folder(llama.directory)
    query = state["model.layers.0.self_attn.q_proj.weight"].numpy()
    half = llama.spec.head_size // 2
    for head in range(4):
        for channel in range(half):
            row = head * 2 * half + 2 * channel
            assert np.array_equal(tensors["blk.0.attn_q.weight"][row], query[head * 2 * half + channel])
            assert np.array_equal(tensors["blk.0.attn_q.weight"][row + 1], query[head * 2 * half + half + channel])


def test_equal_checkpoints_give_equal_bytes(llama: Checkpoint, tmp_path: Path) -> None:
    first, second = (build(llama, tmp_path / name) for name in "ab")
    assert first.digest == second.digest


def test_fp16_recipe_stores_fp16_weights(llama: Checkpoint, tmp_path: Path) -> None:
    checkpoint = quantize(llama, tmp_path / "fp16", weights="fp16")
    engine, float_engine = build(checkpoint, tmp_path / "engine"), build(llama, tmp_path / "float")
    assert engine.size_bytes < 0.6 * float_engine.size_bytes


def test_unsupported_sliding_window_is_rejected(llama: Checkpoint, tmp_path: Path) -> None:
    windowed = with_config(llama, tmp_path / "windowed", sliding_window=32)
    with pytest.raises(BuildError, match="sliding window of 32 tokens"):
        build(windowed, tmp_path / "engine")


def test_unexpected_window_layers_are_rejected(gemma: dict[str, Checkpoint], tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    other = with_config(gemma["gemma3"], tmp_path / "other", layer_types=kinds)
    with pytest.raises(BuildError, match=r"sliding windows must be in layers \[\] for llama.cpp, got \[1\]"):
        build(other, tmp_path / "engine")
