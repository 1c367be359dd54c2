"""Guesses from the text before change how fast tokens come, and nothing of what they are."""

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
WORDS = 7
REPEATED = [5, 17, 42, 99, 7, 23, 64, 11] * 6
"""A text that says the same again and again."""


class PairModel:
    """A model of which the next token depends on the last two, and that counts what it is given to read."""

    def __init__(self, table: np.ndarray) -> None:
        self._table, self._tokens, self.readings = table, list[int](), 0

    def forward(self, tokens: Sequence[int], rows: Sequence[int]) -> np.ndarray:
        before = len(self._tokens)
        self._tokens += tokens
        self.readings += 1
        ends = [before + row + 1 for row in rows]
        return np.array([self._table[tuple(self._tokens[end - 2 : end])] for end in ends])

    def rollback(self, count: int) -> None:
        del self._tokens[len(self._tokens) - count :]


@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, WORDS - 1), min_size=2, max_size=20),
    st.integers(0, 40),
    st.integers(1, prompt_lookup.MAX_DRAFT_TOKENS),
    st.booleans(),
)
def test_what_is_generated_is_what_greedy_decoding_generates(
    seed: int, prompt: list[int], count: int, guessed: int, stop: bool
) -> None:
    table = np.random.default_rng(seed).random((WORDS, WORDS, WORDS), np.float32)
    ends = {WORDS - 1}
    alone, guessing = PairModel(table), PairModel(table)
    expected = greedy.decode(
        lambda tokens: alone.forward(tokens, [len(tokens) - 1])[0], prompt, count, eos_token_ids=ends, stop_at_end=stop
    )
    scores = guessing.forward(prompt, [len(prompt) - 1])[0]
    found = prompt_lookup.decode(
        guessing, scores, prompt, count, draft_tokens=guessed, eos_token_ids=ends, stop_at_end=stop
    )
    assert list(found) == list(expected)
    assert guessing.readings <= max(1, alone.readings)


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 8))
def test_a_guess_is_what_followed_the_same_tokens_when_they_stood_there_last(tokens: list[int], most: int) -> None:
    found = NgramIndex(tokens).draft(most)
    for count in prompt_lookup.NGRAM_SIZES:
        last = tokens[-count:]
        places = [end for end in range(count, len(tokens)) if tokens[end - count : end] == last and len(last) == count]
        if places:
            assert found == tokens[places[-1] : places[-1] + most]
            return
    assert found == []


@pytest.fixture(scope="module", params=RUNTIMES.values(), ids=RUNTIMES.keys())
def pair(request, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory):
    """Sessions of one model with and without guesses."""
    folder, sessions = tmp_path_factory.mktemp("engines"), []
    for number, guessed in enumerate((4, 0)):
        runtime = replace(request.param, prompt_lookup=guessed)
        sessions.append(runtime.open(build_engine(runtime, checkpoint, folder / str(number)), threads=1))
    yield sessions
    for session in sessions:
        session.close()


@pytest.mark.parametrize("prompt", [REPEATED, REPEATED[:1], list(range(3, 40))], ids=["repeated", "one", "new"])
def test_every_runtime_generates_the_same_with_guesses(pair, prompt: list[int]) -> None:
    guessing, alone = (list(session.generate(prompt, 40, stop_at_end=False)) for session in pair)
    assert guessing == alone
    assert len(guessing) == 40


def test_the_end_token_ends_with_guesses_too(pair) -> None:
    guessing, alone = (list(session.generate(REPEATED, 64)) for session in pair)
    assert guessing == alone


def test_logits_and_a_second_answer_are_not_touched_by_guesses(pair) -> None:
    guessing, alone = pair
    first, second = (list(guessing.generate(REPEATED, 20, stop_at_end=False)) for _ in range(2))
    assert first == second
    assert np.abs(guessing.logits(REPEATED) - alone.logits(REPEATED)).max() < 1e-4


@pytest.mark.parametrize("runtime", [Genai(), PortableOnnx(), LlamaCpp(), TensorRt()], ids=lambda one: one.format)
def test_more_guesses_than_a_reading_takes_are_refused(runtime) -> None:
    for wrong in (-1, prompt_lookup.MAX_DRAFT_TOKENS + 1):
        with pytest.raises(ConfigError, match=rf"`prompt_lookup` must be between 0 and 16, got {wrong}"):
            replace(runtime, prompt_lookup=wrong)


@pytest.mark.parametrize("runtime", [Genai(), PortableOnnx(), LlamaCpp(), TensorRt()], ids=lambda one: one.format)
def test_a_prompt_is_read_by_one_token_at_once_or_more(runtime) -> None:
    with pytest.raises(ConfigError, match=r"`prompt_tokens` must be at least 1, got 0\. Use 32, or up to 512"):
        replace(runtime, prompt_tokens=0)


def test_guesses_go_with_no_window_and_no_codes_of_keys_and_values() -> None:
    for lossy in ({"kv_window": 64}, {"keys_values": "int8"}, {"keys_values": "int4"}):
        with pytest.raises(ConfigError, match="prompt_lookup: guesses that were wrong are taken back"):
            PortableOnnx(prompt_lookup=4, **lossy)
    with pytest.raises(ConfigError, match=r"`prompt_lookup` must be between 0 and 3, got 4"):
        LlamaCpp(prompt_tokens=4, prompt_lookup=4)


def test_shards_take_guesses_back_as_the_whole_does(checkpoint: Checkpoint, tmp_path: Path) -> None:
    runtime = PortableOnnx(shards=3, kv_resident="0 B", prompt_lookup=4)
    engine = build_engine(runtime, checkpoint, tmp_path / "engine")
    session = runtime.open(engine, threads=1)
    expected = PortableOnnx().open(engine, threads=1).generate(REPEATED, 40, stop_at_end=False)
    assert list(session.generate(REPEATED, 40, stop_at_end=False)) == list(expected)
    session.close()


def test_the_time_of_a_token_is_not_predicted_with_guesses(checkpoint: Checkpoint) -> None:
    told = Genai(prompt_lookup=4).predict(checkpoint.spec, Target(name="device"), carried_bytes=0)
    assert {m.metric for m in told} == {"size/engine_mib", "memory/peak_rss_mib"}


@given(st.lists(st.sampled_from([1e-6, BURST_GAP_S / 2, BURST_GAP_S, 1e-3, 5e-3]), max_size=30))
def test_tokens_that_come_at_once_share_the_time_until_they_came(times: list[float]) -> None:
    found = spread_bursts(times)
    assert len(found) == len(times)
    assert sum(found) == pytest.approx(sum(times))
    if all(seconds >= BURST_GAP_S for seconds in times):
        assert found == times


def test_three_tokens_of_one_reading_took_a_third_each() -> None:
    assert spread_bursts([3e-3, 1e-6, 1e-6, 1e-3]) == pytest.approx([1e-3 + 2e-6 / 3] * 3 + [1e-3])
