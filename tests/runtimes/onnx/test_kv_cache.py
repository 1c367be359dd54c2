"""Test that quantized and windowed key-value caches lose exactly what their documentation says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from support.stages import build_engine

from edgeopt.checkpoints import modeling
from edgeopt.core.artifact import Checkpoint, Engine
from edgeopt.errors import BuildError, ConfigError
from edgeopt.measure.stats.divergence import relative_error
from edgeopt.runtimes.decoding.chunked_prefill import CHUNK_TOKENS
from edgeopt.runtimes.onnx import kv_cache
from edgeopt.runtimes.onnx.kv_cache import SINK_TOKENS, CacheCapacity, create_cache
from edgeopt.runtimes.onnx.kv_cache_graph import QuantizedCache, example_buffers
from edgeopt.runtimes.onnx.runtime import PortableOnnx
from runtimes.test_families import PROMPT

WINDOW = 32


@pytest.fixture(scope="module")
def engines(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    folder = tmp_path_factory.mktemp("engines")
    cache_types: Any = ("fp32", "fp16", "int8", "int4")
    return {
        name: build_engine(PortableOnnx(keys_values=name, shards=3), checkpoint, folder / name) for name in cache_types
    }


def prompt_logits(engine: Engine, **options: Any) -> np.ndarray:
    session = PortableOnnx(**options).open(engine, threads=1)
    logits = session.logits(PROMPT)
    session.close()
    return logits


@settings(deadline=None)
@given(
    states=arrays.arrays(
        np.float32, (1, 2, 3, 64), elements=st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)
    ),
    bits=st.sampled_from([8, 4]),
)
def test_quantization_error_is_at_most_half_step(states: np.ndarray, bits: int) -> None:
    cache = QuantizedCache(bits, [])
    codes, scales = cache.quantize(torch.from_numpy(states))
    dequantized = cache.dequantize(codes, scales).numpy()
    assert codes.dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert codes.shape[-1] == 64 * bits // 8
    blocks = states.reshape(1, 2, 3, 2, 32)
    steps = np.abs(blocks).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
    error = np.abs(dequantized.reshape(blocks.shape) - blocks)
    assert (error <= steps * (0.5 + 2**-10 * 2**bits) + 1e-6).all()  # scales are rounded to fp16, `steps` are not


@pytest.mark.parametrize("chunk_sizes", [[5, 3, 8, 1, 1, 7, 2], [8] * 4, [1] * 20], ids=str)
def test_only_older_tokens_are_read_quantized(chunk_sizes: list[int]) -> None:
    torch.manual_seed(0)
    ring_slots = 8
    cache = QuantizedCache(8, example_buffers("int8", batch=1, heads=2, capacity=40, recent=ring_slots, head_size=32))
    states = torch.randn(1, 2, sum(chunk_sizes), 32)
    dequantized = cache.dequantize(*cache.quantize(states))
    length = 0
    for size in chunk_sizes:
        chunk = states[:, :, length : length + size]
        cached = cache.write(chunk, torch.tensor(length), torch.tensor(length))
        length += size
        first_recent = max(0, length - ring_slots)
        assert torch.equal(cached[:, :, first_recent:length], states[:, :, first_recent:length])
        assert torch.equal(cached[:, :, :first_recent], dequantized[:, :, :first_recent])


@pytest.mark.parametrize(("cache_type", "max_error"), [("fp16", 1e-3), ("int8", 0.02), ("int4", 0.4)])
def test_quantized_cache_error_is_bounded(
    cache_type: str, max_error: float, engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "RECENT_TOKENS", 16)
    error = relative_error(prompt_logits(engines["fp32"]), prompt_logits(engines[cache_type]))
    assert 1e-6 < error < max_error


@pytest.mark.parametrize("cache_type", ["int8", "int4"])
def test_quantized_cache_is_exact_for_recent_tokens(cache_type: str, engines: dict[str, Engine]) -> None:
    short = PROMPT[: kv_cache.RECENT_TOKENS]
    exact, quantized = (PortableOnnx().open(engines[name], threads=1) for name in ("fp32", cache_type))
    assert relative_error(exact.logits(short), quantized.logits(short)) < 1e-5


def window_mask() -> torch.Tensor:
    """Return the attention mask of a windowed cache as documented, shape (tokens, tokens), computed independently."""
    mask = torch.zeros(len(PROMPT), len(PROMPT), dtype=torch.bool)
    cached: list[int] = []
    for start in range(0, len(PROMPT), CHUNK_TOKENS):
        chunk = list(range(start, min(start + CHUNK_TOKENS, len(PROMPT))))
        if len(cached) + len(chunk) > SINK_TOKENS + WINDOW + CHUNK_TOKENS:
            cached = cached[:SINK_TOKENS] + cached[-WINDOW:]
        cached += chunk
        for token in chunk:
            mask[token, [other for other in cached if other <= token]] = True
    return mask


def test_window_keeps_sinks_and_recent_tokens(checkpoint: Checkpoint, engines: dict[str, Engine]) -> None:
    network, mask = modeling.load(checkpoint), window_mask()
    assert mask[-1].sum() < len(PROMPT)
    assert mask[:, :SINK_TOKENS].sum() == mask.tril()[:, :SINK_TOKENS].sum()
    assert all(row[max(0, token - WINDOW) : token + 1].all() for token, row in enumerate(mask))
    lowest = torch.finfo(torch.float32).min
    additive_mask = torch.zeros(mask.shape).masked_fill(~mask, lowest)[None, None]
    with torch.no_grad():
        expected = network(torch.tensor([PROMPT]), attention_mask=additive_mask).logits[0].numpy()
    windowed = prompt_logits(engines["fp32"], kv_window=WINDOW)
    assert relative_error(expected, windowed) < 1e-4
    assert relative_error(prompt_logits(engines["fp32"]), windowed) > 1e-2


def test_window_of_whole_text_changes_nothing(engines: dict[str, Engine]) -> None:
    assert (prompt_logits(engines["fp32"], kv_window=len(PROMPT)) == prompt_logits(engines["fp32"])).all()


@pytest.mark.parametrize("cache_type", ["fp32", "int8", "int4"])
def test_offloaded_window_matches_window_in_memory(cache_type: str, engines: dict[str, Engine]) -> None:
    engine = engines[cache_type]
    in_memory = prompt_logits(engine, kv_window=WINDOW, shards=3, kv_resident="1 GiB")
    assert (prompt_logits(engine, kv_window=WINDOW, shards=3, kv_resident="0 B") == in_memory).all()
    generated = [
        list(PortableOnnx(**options).open(engine, threads=1).generate(PROMPT, 40, stop_at_end=False))
        for options in ({"kv_window": WINDOW}, {"kv_window": WINDOW, "shards": 3, "kv_resident": "0 B"})
    ]
    assert len(generated[0]) == 40
    assert generated[0] == generated[1]


@given(
    length=st.integers(1, 10_000),
    chunk_tokens=st.integers(1, 600),
    window=st.none() | st.integers(32, 4096),
)
def test_window_and_text_bound_cache_capacity(length: int, chunk_tokens: int, window: int | None) -> None:
    capacity = CacheCapacity(length, min(chunk_tokens, length), window)
    assert capacity.slots <= length
    assert min(chunk_tokens, length) <= capacity.recent_slots <= capacity.slots
    assert capacity.slots == length if window is None else capacity.slots <= SINK_TOKENS + window + chunk_tokens


class SessionWithoutPastLength:
    """A session of a graph that returns its cache instead of updating buffers."""

    def get_inputs(self) -> list[Any]:
        return []


def test_imported_graph_rejects_window(checkpoint: Checkpoint) -> None:
    with pytest.raises(BuildError, match=r"`kv_window` requires a graph that edgeopt exported.*Use null"):
        create_cache(SessionWithoutPastLength(), checkpoint.spec, CacheCapacity(64, 32, 32), {})


def test_baseline_is_lossless_without_budgets() -> None:
    lossy = PortableOnnx(keys_values="int4", kv_window=512, shards=4, kv_resident="0 B", arena=False)
    assert lossy.baseline == PortableOnnx(arena=False)
    budget = PortableOnnx(keys_values="fp16", shards=4, resident="1 MiB", prepacked=False, read_ahead=True)
    assert budget.baseline == PortableOnnx(prepacked=False)
    assert replace(budget, processes=2).baseline == PortableOnnx(shards=4, prepacked=False, processes=2)


def test_calibrated_kv_cache_is_rejected(checkpoint: Checkpoint) -> None:
    from edgeopt.compress.quantization.kv_cache import KvCache

    with pytest.raises(ConfigError, match=r"runtime\.keys_values=int8 instead of the step"):
        PortableOnnx().check(KvCache().plan(checkpoint.spec))
