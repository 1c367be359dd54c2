"""Keys and values in fewer bits or of fewer tokens: what is lost is what is said, and no more."""

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
from edgeopt.runtimes.onnx.kv_cache import SINKS, Room, cache_of
from edgeopt.runtimes.onnx.kv_cache_graph import Coded, examples
from edgeopt.runtimes.onnx.runtime import PortableOnnx
from runtimes.test_families import PROMPT

WINDOW = 32


@pytest.fixture(scope="module")
def engines(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    folder = tmp_path_factory.mktemp("engines")
    forms: Any = ("fp32", "fp16", "int8", "int4")
    return {form: build_engine(PortableOnnx(keys_values=form, shards=3), checkpoint, folder / form) for form in forms}


def logits(engine: Engine, **values: Any) -> np.ndarray:
    session = PortableOnnx(**values).open(engine, threads=1)
    found = session.logits(PROMPT)
    session.close()
    return found


@settings(deadline=None)
@given(
    states=arrays.arrays(
        np.float32, (1, 2, 3, 64), elements=st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)
    ),
    bits=st.sampled_from([8, 4]),
)
def test_a_code_is_off_by_half_a_step_of_its_block_at_most(states: np.ndarray, bits: int) -> None:
    coded = Coded(bits, [])
    codes, scales = coded.code(torch.from_numpy(states))
    found = coded.decode(codes, scales).numpy()
    assert codes.dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert codes.shape[-1] == 64 * bits // 8
    blocks = states.reshape(1, 2, 3, 2, 32)
    steps = np.abs(blocks).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
    error = np.abs(found.reshape(blocks.shape) - blocks)
    assert (error <= steps * (0.5 + 2**-10 * 2**bits) + 1e-6).all()  # scales are in fp16, the steps are not


@pytest.mark.parametrize("parts", [[5, 3, 8, 1, 1, 7, 2], [8] * 4, [1] * 20], ids=str)
def test_the_last_tokens_are_read_as_they_are_and_others_as_codes(parts: list[int]) -> None:
    torch.manual_seed(0)
    ring = 8
    coded = Coded(8, examples("int8", batch=1, heads=2, capacity=40, recent=ring, head_size=32))
    states = torch.randn(1, 2, sum(parts), 32)
    as_codes = coded.decode(*coded.code(states))
    length = 0
    for part in parts:
        new = states[:, :, length : length + part]
        read = coded.write(new, torch.tensor(length), torch.tensor(length))
        length += part
        last = max(0, length - ring)
        assert torch.equal(read[:, :, last:length], states[:, :, last:length])
        assert torch.equal(read[:, :, :last], as_codes[:, :, :last])


@pytest.mark.parametrize(("form", "most"), [("fp16", 1e-3), ("int8", 0.02), ("int4", 0.4)])
def test_fewer_bits_lose_little(
    form: str, most: float, engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "RECENT", 16)
    assert 1e-6 < relative_error(logits(engines["fp32"]), logits(engines[form])) < most


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_nothing_is_lost_while_all_tokens_are_among_the_last(form: str, engines: dict[str, Engine]) -> None:
    short = PROMPT[: kv_cache.RECENT]
    whole, coded = (PortableOnnx().open(engines[name], threads=1) for name in ("fp32", form))
    assert relative_error(whole.logits(short), coded.logits(short)) < 1e-5


def seen() -> torch.Tensor:
    """By the words of the documentation: which tokens of the prompt each one reads, (tokens, tokens)."""
    found = torch.zeros(len(PROMPT), len(PROMPT), dtype=torch.bool)
    held: list[int] = []
    for start in range(0, len(PROMPT), CHUNK_TOKENS):
        new = list(range(start, min(start + CHUNK_TOKENS, len(PROMPT))))
        if len(held) + len(new) > SINKS + WINDOW + CHUNK_TOKENS:
            held = held[:SINKS] + held[-WINDOW:]
        held += new
        for token in new:
            found[token, [other for other in held if other <= token]] = True
    return found


def test_out_of_a_window_the_first_tokens_alone_are_read(checkpoint: Checkpoint, engines: dict[str, Engine]) -> None:
    network, mask = modeling.load(checkpoint), seen()
    assert mask[-1].sum() < len(PROMPT)
    assert mask[:, :SINKS].sum() == mask.tril()[:, :SINKS].sum()
    assert all(row[max(0, token - WINDOW) : token + 1].all() for token, row in enumerate(mask))
    lowest = torch.finfo(torch.float32).min
    given = torch.zeros(mask.shape).masked_fill(~mask, lowest)[None, None]
    with torch.no_grad():
        expected = network(torch.tensor([PROMPT]), attention_mask=given).logits[0].numpy()
    found = logits(engines["fp32"], kv_window=WINDOW)
    assert relative_error(expected, found) < 1e-4
    assert relative_error(logits(engines["fp32"]), found) > 1e-2


def test_a_window_that_holds_the_text_changes_nothing(engines: dict[str, Engine]) -> None:
    assert (logits(engines["fp32"], kv_window=len(PROMPT)) == logits(engines["fp32"])).all()


@pytest.mark.parametrize("form", ["fp32", "int8", "int4"])
def test_tiers_and_windows_go_together(form: str, engines: dict[str, Engine]) -> None:
    alone = logits(engines[form], kv_window=WINDOW, shards=3, kv_resident="1 GiB")
    assert (logits(engines[form], kv_window=WINDOW, shards=3, kv_resident="0 B") == alone).all()
    generated = [
        list(PortableOnnx(**values).open(engines[form], threads=1).generate(PROMPT, 40, stop_at_end=False))
        for values in ({"kv_window": WINDOW}, {"kv_window": WINDOW, "shards": 3, "kv_resident": "0 B"})
    ]
    assert len(generated[0]) == 40
    assert generated[0] == generated[1]


@given(
    length=st.integers(1, 10_000),
    chunk_tokens=st.integers(1, 600),
    window=st.none() | st.integers(32, 4096),
)
def test_room_is_bounded_by_the_window_and_the_text(length: int, chunk_tokens: int, window: int | None) -> None:
    room = Room(length, min(chunk_tokens, length), window)
    assert room.slots <= length
    assert min(chunk_tokens, length) <= room.recent <= room.slots
    assert room.slots == length if window is None else room.slots <= SINKS + window + chunk_tokens


class Foreign:
    """A graph that hands keys and values back."""

    def get_inputs(self) -> list[Any]:
        return []


def test_a_graph_that_keeps_all_by_itself_takes_no_window(checkpoint: Checkpoint) -> None:
    with pytest.raises(BuildError, match=r"keeps keys and values by itself.*Leave it out"):
        cache_of(Foreign(), checkpoint.spec, Room(64, 32, 32), {})


def test_the_model_to_compare_with_keeps_all_as_it_is_and_in_memory() -> None:
    lossy = PortableOnnx(keys_values="int4", kv_window=512, shards=4, kv_resident="0 B", arena=False)
    assert lossy.baseline == PortableOnnx(arena=False)
    budget = PortableOnnx(keys_values="fp16", shards=4, resident="1 MiB", prepacked=False, read_ahead=True)
    assert budget.baseline == PortableOnnx(prepacked=False)
    assert replace(budget, processes=2).baseline == PortableOnnx(shards=4, prepacked=False, processes=2)


def test_a_calibrated_grid_of_keys_is_refused_with_the_runtimes_own(checkpoint: Checkpoint) -> None:
    from edgeopt.compress.quantization.kv_cache import KvCache

    with pytest.raises(ConfigError, match=r"runtime\.keys_values=int8 in place of the step"):
        PortableOnnx().check(KvCache().plan(checkpoint.spec))
