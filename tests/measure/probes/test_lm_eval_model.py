"""Compare scores of texts with sums over tokens, for an engine whose predictions depend on all earlier tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from support import toy_bench

from edgeopt.errors import MeasureError
from edgeopt.measure.harness.fake_runtime import FakeRuntime
from edgeopt.measure.probes.lm_eval_model import Scorer

TABLE = 3 * np.random.default_rng(4).standard_normal((64, 64))
LOG_P = TABLE - np.log(np.exp(TABLE).sum(axis=-1, keepdims=True))
CONTEXT = 8


class SummingSession:
    """Session whose logits are row s mod 64 of the table, where s is the sum of all token ids so far."""

    def __init__(self) -> None:
        self.passes = 0

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        assert len(tokens) <= CONTEXT
        self.passes += 1
        return TABLE[np.cumsum(tokens) % 64].astype(np.float32)

    def generate(self, tokens: Sequence[int], max_new_tokens: int, *, stop_at_end: bool = True) -> Iterator[int]:
        assert len(tokens) + max_new_tokens <= CONTEXT
        generated = list(tokens)
        for _ in range(max_new_tokens):
            generated.append(int(TABLE[sum(generated) % 64].argmax()))
            yield generated[-1]

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with the toy tokenizer, which adds no prefix to a text."""
    return toy_bench.build(tmp_path_factory.mktemp("engine"), FakeRuntime()).directory


@pytest.fixture(scope="module")
def folder_with_prefix(folder, tmp_path_factory):
    """Return a folder with the toy tokenizer for a model that starts every text with w7."""
    directory = tmp_path_factory.mktemp("prefix")
    shutil.copyfile(folder / "tokenizer.json", directory / "tokenizer.json")
    (directory / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": "w7"}))
    return directory


def words(ids):
    return " ".join(f"w{i}" for i in ids)


def log_p(ids, before):
    """Return log p of each of `ids`, given at most `CONTEXT` ids before it."""
    sequence = [*before, *ids]
    return [LOG_P[sum(sequence[max(0, i - CONTEXT) : i]) % 64, sequence[i]] for i in range(len(before), len(sequence))]


@pytest.mark.parametrize(("context", "continuation"), [([3], [5]), ([3, 9, 60], [5, 5, 1]), ([1], list(range(7)))])
def test_continuation_score_is_sum_over_tokens(folder, context, continuation):
    score, _ = Scorer(SummingSession(), folder, CONTEXT).log_likelihood(words(context), f" {words(continuation)}")
    assert score == pytest.approx(sum(log_p(continuation, context)), rel=1e-5)


def test_long_context_is_truncated_at_start(folder):
    context = list(range(10, 40))
    score, _ = Scorer(SummingSession(), folder, CONTEXT).log_likelihood(words(context), f" {words([2])}")
    assert score == pytest.approx(log_p([2], context)[0], rel=1e-5)


def test_space_may_end_context_or_start_continuation(folder):
    scorer = Scorer(SummingSession(), folder, CONTEXT)
    assert scorer.log_likelihood("w3 w4 ", "w5") == scorer.log_likelihood("w3 w4", " w5")


def test_greedy_continuation_is_recognized(folder):
    scorer, generated = Scorer(SummingSession(), folder, CONTEXT), list(SummingSession().generate([3], 4))
    assert scorer.log_likelihood("w3", f" {words(generated)}")[1]
    assert not scorer.log_likelihood("w3", f" {words([*generated[:-1], (generated[-1] + 1) % 63])}")[1]


def test_single_token_choices_share_a_forward_pass(folder):
    session = SummingSession()
    scorer = Scorer(session, folder, CONTEXT)
    scores = [scorer.log_likelihood("w3 w9", f" w{choice}")[0] for choice in (1, 2, 3)]
    assert scores == pytest.approx([LOG_P[12, choice] for choice in (1, 2, 3)], rel=1e-5)
    assert session.passes == 1


def test_empty_context_uses_beginning_token(folder_with_prefix):
    score, _ = Scorer(SummingSession(), folder_with_prefix, CONTEXT).log_likelihood("", words([5, 6]))
    assert score == pytest.approx(sum(log_p([5, 6], [7])), rel=1e-5)


def test_empty_context_without_beginning_token_is_rejected(folder):
    with pytest.raises(MeasureError, match="has no beginning-of-sequence token"):
        Scorer(SummingSession(), folder, CONTEXT).log_likelihood("", "w1 w2")


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 16, 21])
def test_rolling_score_predicts_each_token_once(folder_with_prefix, length):
    ids = [(5 * i + 1) % 63 for i in range(length)]
    sequence, expected = [7, *ids], 0.0
    for start in range(1, len(sequence), CONTEXT):
        end = min(start + CONTEXT, len(sequence))
        inputs = sequence[max(0, end - 1 - CONTEXT) : end]
        rows = LOG_P[np.cumsum(inputs)[:-1] % 64, inputs[1:]]
        expected += rows[len(rows) - (end - start) :].sum()
    score = Scorer(SummingSession(), folder_with_prefix, CONTEXT).rolling_log_likelihood(words(ids))
    assert score == pytest.approx(expected, rel=1e-5)


def test_generation_ends_before_first_stop(folder):
    generated = list(SummingSession().generate([3], 4))
    scorer = Scorer(SummingSession(), folder, CONTEXT)
    assert scorer.generate_until("w3", [], 4) == words(generated)
    assert scorer.generate_until("w3", [f"w{generated[2]}", "never"], 4) == f"{words(generated[:2])} "


def test_more_tokens_than_context_are_rejected(folder):
    scorer = Scorer(SummingSession(), folder, CONTEXT)
    with pytest.raises(MeasureError, match="got a context of 8"):
        scorer.generate_until("w3", [], CONTEXT)
    with pytest.raises(MeasureError, match="at most 8 tokens, got 9"):
        scorer.log_likelihood("w3", f" {words(range(9))}")
