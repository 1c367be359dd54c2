from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeopt.core.model_spec import PROJECTIONS, Adapter, LayerSpec, ModelSpec, QuantizationScheme
from edgeopt.errors import InputError

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
layers = st.builds(
    LayerSpec, intermediate_size=st.integers(1, 4096), heads=st.integers(1, 32), kv_heads=st.integers(1, 8)
)
schemes = st.builds(
    QuantizationScheme, bits=st.sampled_from([2, 4, 8]), block_size=st.sampled_from([32, 128]), symmetric=st.booleans()
)
targets = st.sets(st.sampled_from([name for unit in PROJECTIONS.values() for name in unit])).map(tuple)
adapters = st.builds(Adapter, rank=st.integers(2, 64), targets=targets)
specs = st.builds(
    ModelSpec,
    architecture=st.just("LlamaForCausalLM"),
    vocabulary_size=st.integers(1, 200_000),
    hidden_size=st.integers(1, 4096),
    head_size=st.integers(1, 128),
    context_length=st.integers(1, 100_000),
    tied_embeddings=st.booleans(),
    layers=st.lists(layers, min_size=1, max_size=4).map(tuple),
    weight_dtype=st.sampled_from(["fp32", "fp16"]),
    schemes=st.dictionaries(st.sampled_from(["layers.0.qkv", "layers.0.down", "lm_head", "embedding"]), schemes),
    adapters=st.dictionaries(st.sampled_from(["default", "other"]), adapters),
)


def matrices(spec: ModelSpec) -> list[tuple[int, ...]]:
    """Return the shape of every weight of a Llama."""
    shapes: list[tuple[int, ...]] = [(spec.vocabulary_size, spec.hidden_size), (spec.hidden_size,)]
    if not spec.tied_embeddings:
        shapes.append((spec.vocabulary_size, spec.hidden_size))
    for layer in spec.layers:
        query, key_value = layer.heads * spec.head_size, layer.kv_heads * spec.head_size
        shapes += [(query, spec.hidden_size), (key_value, spec.hidden_size), (key_value, spec.hidden_size)]
        shapes += [(spec.hidden_size, query)]
        shapes += [(layer.intermediate_size, spec.hidden_size)] * 2 + [(spec.hidden_size, layer.intermediate_size)]
        shapes += [(spec.hidden_size,), (spec.hidden_size,)]
    return shapes


@given(spec=specs)
def test_parameters_are_the_sum_of_all_shapes(spec: ModelSpec) -> None:
    total = 0
    for shape in matrices(spec):
        count = 1
        for side in shape:
            count *= side
        total += count
    assert spec.parameters == total


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_equal_torch_count(tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {k: v for k, v in CONFIG.items() if k != "architectures"} | {"tie_word_embeddings": tied}
    network = LlamaForCausalLM(LlamaConfig(**config))
    counted = sum(p.numel() for p in {id(p): p for p in network.parameters()}.values())
    assert ModelSpec.from_hf_config(CONFIG | {"tie_word_embeddings": tied}).parameters == counted


def test_saved_model_has_expected_spec(tiny_model: Path) -> None:
    spec = ModelSpec.from_hf_config(json.loads((tiny_model / "config.json").read_text()))
    assert spec == ModelSpec.from_hf_config(CONFIG)
    assert spec.layers == (LayerSpec(intermediate_size=128, heads=4, kv_heads=2),) * 2
    assert (spec.head_size, spec.vocabulary_size, spec.context_length, spec.tied_embeddings) == (16, 300, 256, True)


@given(spec=specs)
def test_units_cover_all_weights_except_norms(spec: ModelSpec) -> None:
    weights = sum(rows * columns for name, (rows, columns) in spec.matrices.items())
    tables = spec.vocabulary_size * spec.hidden_size
    norms = spec.hidden_size * (2 * len(spec.layers) + 1)
    assert weights + norms == spec.parameters + (tables if spec.tied_embeddings else 0)


def packed_bytes(rows: int, columns: int, bits: int, block: int, symmetric: bool) -> int:
    """Return the total bytes of the tensors of a quantized matrix.

    Codes are uint8 (rows, blocks, block · bits / 8), scales are float16 (rows, blocks), and the zero points of
    asymmetric weights are uint8 (rows, ceil(blocks · bits / 8)).
    """
    blocks = len(range(0, columns, block))
    weights = np.empty((rows, blocks, block * bits // 8), np.uint8)
    scales = np.empty((rows, blocks), np.float16)
    zeros = np.empty((rows, (blocks * bits + 7) // 8), np.uint8)
    return weights.nbytes + scales.nbytes + (0 if symmetric else zeros.nbytes)


@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    bits=st.sampled_from([2, 4, 8]),
    block=st.sampled_from([16, 32, 64, 128]),
    symmetric=st.booleans(),
)
def test_matrix_size_is_the_sum_of_its_tensors(rows: int, columns: int, bits: int, block: int, symmetric: bool) -> None:
    size = QuantizationScheme(bits=bits, block_size=block, symmetric=symmetric).size_bytes(rows, columns)
    assert size == packed_bytes(rows, columns, bits, block, symmetric)


@given(adapter=adapters)
def test_adapter_size_is_the_sum_of_its_factors(adapter: Adapter) -> None:
    """Factors are fp32. Query, key and value are one fused matrix with one update."""
    sides = {"o_proj": (64, 64), "gate_proj": (128, 64), "up_proj": (128, 64), "down_proj": (64, 128)}
    sides |= dict.fromkeys(("q_proj", "k_proj", "v_proj"), (64 + 32 + 32, 64))
    spec = replace(ModelSpec.from_hf_config(CONFIG), adapters={"default": adapter})
    assert spec.adapter_bytes("default") == 2 * sum(4 * adapter.rank * sum(sides[name]) for name in adapter.targets)


def test_spec_without_adapters_keeps_former_digest() -> None:
    spec = ModelSpec.from_hf_config(CONFIG)
    assert "adapters" not in spec.to_json()
    assert ModelSpec.from_json(spec.to_json()).adapters == {}


def test_bits_per_weight_include_scales() -> None:
    spec = ModelSpec.from_hf_config(CONFIG)
    assert spec.bits_per_weight == 32
    scheme = QuantizationScheme(bits=4, block_size=32, symmetric=True)
    assert replace(spec, schemes=dict.fromkeys(spec.matrices, scheme)).bits_per_weight == 4 + 16 / 32


@given(spec=specs)
def test_json_round_trip_preserves_spec(spec: ModelSpec) -> None:
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_missing_config_keys_have_defaults() -> None:
    config = {k: v for k, v in CONFIG.items() if k not in ("num_key_value_heads", "head_dim")}
    spec = ModelSpec.from_hf_config(config)
    assert spec.layers[0].kv_heads == 4, "without grouped-query attention, every head has its own keys"
    assert spec.head_size == 64 // 4


def test_null_text_config_is_ignored() -> None:
    assert ModelSpec.from_hf_config({**CONFIG, "text_config": None}) == ModelSpec.from_hf_config(CONFIG)


def test_multimodal_config_uses_text_model_sizes() -> None:
    text = {k: v for k, v in CONFIG.items() if k != "architectures"}
    nested = {"architectures": ["Gemma3ForCausalLM"], "text_config": text, "vision_config": {"hidden_size": 9}}
    assert ModelSpec.from_hf_config(nested).hidden_size == 64


@pytest.mark.parametrize(
    "config",
    [
        {**CONFIG, "architectures": ["BertForMaskedLM"]},
        {**CONFIG, "architectures": ["T5ForConditionalGeneration"]},
        {**CONFIG, "architectures": []},
        {k: v for k, v in CONFIG.items() if k != "architectures"},
        {k: v for k, v in CONFIG.items() if k != "intermediate_size"},
        {**CONFIG, "hidden_size": "64"},
        {**CONFIG, "num_attention_heads": 0},
        {**CONFIG, "num_hidden_layers": 0},
        [CONFIG],
        "LlamaForCausalLM",
        {},
    ],
    ids=str,
)
def test_other_architectures_are_rejected(config: Any) -> None:
    with pytest.raises(InputError, match=r"config\.json") as caught:
        ModelSpec.from_hf_config(config)
    assert caught.value.hint
