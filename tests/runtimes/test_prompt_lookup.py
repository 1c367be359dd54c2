"""Test that prompt lookup drafts repeated text and never changes the generated tokens."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.stages import build_engine

from edgeopt.core.artifact import Checkpoint
from edgeopt.core.target import Target
from edgeopt.errors import ConfigError
from edgeopt.machine.contention import BURST_GAP_S, spread_bursts
from edgeopt.runtimes.decoding import greedy, prompt_lookup
from edgeopt.runtimes.decoding.prompt_lookup import NgramIndex
from edgeopt.runtimes.genai.runtime import Genai
from edgeopt.runtimes.llamacpp.runtime import LlamaCpp
from edgeopt.runtimes.onnx.runtime import PortableOnnx
from edgeopt.runtimes.tensorrt.runtime import TensorRt

RUNTIMES = {"genai": Genai(), "onnx": PortableOnnx()}
if find_spec("llama_cpp"):
    RUNTIMES["llamacpp"] = LlamaCpp(keys_values="fp32")
VOCABULARY = 7
REPEATED = [5, 17, 42, 99, 7, 23, 64, 11] * 6
"""A text that repeats the same tokens."""


class BigramModel:
    """Fake SequenceState whose logits depend on the last two tokens. It counts its calls."""

    def __init__(self, table: np.ndarray) -> None:
        self._table, self._tokens, self.calls = table, list[int](), 0

    def forward(self, tokens: Sequence[int], rows: Sequence[int]) -> np.ndarray:
        start = len(self._tokens)
        self._tokens += tokens
        self.calls += 1
        ends = [start + row + 1 for row in rows]
        return np.array([self._table[tuple(self._tokens[end - 2 : end])] for end in ends])

    def rollback(self, count: int) -> None:
        del self._tokens[len(self._tokens) - count :]


@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, VOCABULARY - 1), min_size=2, max_size=20),
    st.integers(0, 40),
    st.integers(1, prompt_lookup.MAX_DRAFT_TOKENS),
    st.booleans(),
)
def test_prompt_lookup_equals_greedy_decoding(
    seed: int, prompt: list[int], count: int, draft_tokens: int, stop: bool
) -> None:
    table = np.random.default_rng(seed).random((VOCABULARY, VOCABULARY, VOCABULARY), np.float32)
    eos = {VOCABULARY - 1}
    plain, drafting = BigramModel(table), BigramModel(table)
    expected = greedy.decode(
        lambda tokens: plain.forward(tokens, [len(tokens) - 1])[0], prompt, count, eos_token_ids=eos, stop_at_end=stop
    )
    logits = drafting.forward(prompt, [len(prompt) - 1])[0]
    tokens = prompt_lookup.decode(
        drafting, logits, prompt, count, draft_tokens=draft_tokens, eos_token_ids=eos, stop_at_end=stop
    )
    assert list(tokens) == list(expected)
    assert drafting.calls <= max(1, plain.calls)


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 8))
def test_draft_repeats_last_continuation_of_ngram(tokens: list[int], max_tokens: int) -> None:
    draft = NgramIndex(tokens).draft(max_tokens)
    for size in prompt_lookup.NGRAM_SIZES:
        ngram = tokens[-size:]
        ends = [end for end in range(size, len(tokens)) if tokens[end - size : end] == ngram and len(ngram) == size]
        if ends:
            assert draft == tokens[ends[-1] : ends[-1] + max_tokens]
            return
    assert draft == []


@pytest.fixture(scope="module", params=RUNTIMES.values(), ids=RUNTIMES.keys())
def sessions(request, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory):
    """Return sessions of one model with and without prompt lookup."""
    folder, opened = tmp_path_factory.mktemp("engines"), []
    for number, draft_tokens in enumerate((4, 0)):
        runtime = replace(request.param, prompt_lookup=draft_tokens)
        opened.append(runtime.open(build_engine(runtime, checkpoint, folder / str(number)), threads=1))
    yield opened
    for session in opened:
        session.close()


@pytest.mark.parametrize("prompt", [REPEATED, REPEATED[:1], list(range(3, 40))], ids=["repeated", "one", "new"])
def test_runtime_generates_same_tokens_with_drafts(sessions, prompt: list[int]) -> None:
    drafting, plain = (list(session.generate(prompt, 40, stop_at_end=False)) for session in sessions)
    assert drafting == plain
    assert len(drafting) == 40


def test_end_token_stops_generation_with_drafts(sessions) -> None:
    drafting, plain = (list(session.generate(REPEATED, 64)) for session in sessions)
    assert drafting == plain


def test_drafts_leave_logits_and_next_generation_unchanged(sessions) -> None:
    drafting, plain = sessions
    first, second = (list(drafting.generate(REPEATED, 20, stop_at_end=False)) for _ in range(2))
    assert first == second
    assert np.abs(drafting.logits(REPEATED) - plain.logits(REPEATED)).max() < 1e-4


@pytest.mark.parametrize(
    "runtime", [Genai(), PortableOnnx(), LlamaCpp(), TensorRt()], ids=lambda runtime: runtime.format
)
def test_draft_tokens_out_of_range_are_rejected(runtime) -> None:
    for draft_tokens in (-1, prompt_lookup.MAX_DRAFT_TOKENS + 1):
        with pytest.raises(ConfigError, match=rf"`prompt_lookup` must be between 0 and 16, got {draft_tokens}"):
            replace(runtime, prompt_lookup=draft_tokens)


@pytest.mark.parametrize(
    "runtime", [Genai(), PortableOnnx(), LlamaCpp(), TensorRt()], ids=lambda runtime: runtime.format
)
def test_empty_prompt_chunk_is_rejected(runtime) -> None:
    with pytest.raises(ConfigError, match=r"`prompt_tokens` must be at least 1, got 0\. Use 32, or up to 512"):
        replace(runtime, prompt_tokens=0)


def test_prompt_lookup_rejects_lossy_kv_cache() -> None:
    for lossy in ({"kv_window": 64}, {"keys_values": "int8"}, {"keys_values": "int4"}):
        with pytest.raises(ConfigError, match="`prompt_lookup` requires a lossless cache"):
            PortableOnnx(prompt_lookup=4, **lossy)
    with pytest.raises(ConfigError, match=r"`prompt_lookup` must be between 0 and 3, got 4"):
        LlamaCpp(prompt_tokens=4, prompt_lookup=4)


def test_shards_roll_back_rejected_drafts(checkpoint: Checkpoint, tmp_path: Path) -> None:
    runtime = PortableOnnx(shards=3, kv_resident="0 B", prompt_lookup=4)
    engine = build_engine(runtime, checkpoint, tmp_path / "engine")
    session = runtime.open(engine, threads=1)
    expected = PortableOnnx().open(engine, threads=1).generate(REPEATED, 40, stop_at_end=False)
    assert list(session.generate(REPEATED, 40, stop_at_end=False)) == list(expected)
    session.close()


def test_prompt_lookup_disables_latency_prediction(checkpoint: Checkpoint) -> None:
    predictions = Genai(prompt_lookup=4).predict(checkpoint.spec, Target(name="device"), copied_bytes=0)
    assert {m.metric for m in predictions} == {"size/engine_mib", "memory/peak_rss_mib"}


@given(st.lists(st.sampled_from([1e-6, BURST_GAP_S / 2, BURST_GAP_S, 1e-3, 5e-3]), max_size=30))
def test_tokens_of_a_burst_share_its_time(times: list[float]) -> None:
    spread = spread_bursts(times)
    assert len(spread) == len(times)
    assert sum(spread) == pytest.approx(sum(times))
    if all(seconds >= BURST_GAP_S for seconds in times):
        assert spread == times


def test_three_tokens_of_one_burst_take_equal_time() -> None:
    assert spread_bursts([3e-3, 1e-6, 1e-6, 1e-3]) == pytest.approx([1e-3 + 2e-6 / 3] * 3 + [1e-3])
