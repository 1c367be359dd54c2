"""Scores of text against sums over its tokens, from an engine that predicts from all that came before."""

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


class Summing:
    """Row s of the table, where s is the sum of all ids so far, predicts the next one."""

    def __init__(self) -> None:
        self.passes = 0

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        assert len(tokens) <= CONTEXT
        self.passes += 1
        return TABLE[np.cumsum(tokens) % 64].astype(np.float32)

    def generate(self, tokens: Sequence[int], max_new_tokens: int, *, stop_at_end: bool = True) -> Iterator[int]:
        assert len(tokens) + max_new_tokens <= CONTEXT
        said = list(tokens)
        for _ in range(max_new_tokens):
            said.append(int(TABLE[sum(said) % 64].argmax()))
            yield said[-1]

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the toy tokenizer, which puts nothing before a text."""
    return toy_bench.build(tmp_path_factory.mktemp("engine"), FakeRuntime()).directory


@pytest.fixture(scope="module")
def beginning(folder, tmp_path_factory):
    """The same tokenizer, for a model that begins every text with w7."""
    directory = tmp_path_factory.mktemp("beginning")
    shutil.copyfile(folder / "tokenizer.json", directory / "tokenizer.json")
    (directory / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": "w7"}))
    return directory


def words(ids):
    return " ".join(f"w{i}" for i in ids)


def log_p(ids, before):
    """log p of each of `ids`, from at most `CONTEXT` ids before it."""
    whole = [*before, *ids]
    return [LOG_P[sum(whole[max(0, i - CONTEXT) : i]) % 64, whole[i]] for i in range(len(before), len(whole))]


@pytest.mark.parametrize(("context", "continuation"), [([3], [5]), ([3, 9, 60], [5, 5, 1]), ([1], list(range(7)))])
def test_a_continuation_has_the_probability_of_its_tokens(folder, context, continuation):
    score, _ = Scorer(Summing(), folder, CONTEXT).log_likelihood(words(context), f" {words(continuation)}")
    assert score == pytest.approx(sum(log_p(continuation, context)), rel=1e-5)


def test_the_beginning_of_a_context_too_long_is_cut(folder):
    context = list(range(10, 40))
    score, _ = Scorer(Summing(), folder, CONTEXT).log_likelihood(words(context), f" {words([2])}")
    assert score == pytest.approx(log_p([2], context)[0], rel=1e-5)


def test_spaces_between_context_and_continuation_may_stand_on_either_side(folder):
    scorer = Scorer(Summing(), folder, CONTEXT)
    assert scorer.log_likelihood("w3 w4 ", "w5") == scorer.log_likelihood("w3 w4", " w5")


def test_a_continuation_is_greedy_where_each_token_is_the_most_probable(folder):
    scorer, said = Scorer(Summing(), folder, CONTEXT), list(Summing().generate([3], 4))
    assert scorer.log_likelihood("w3", f" {words(said)}")[1]
    assert not scorer.log_likelihood("w3", f" {words([*said[:-1], (said[-1] + 1) % 63])}")[1]


def test_choices_of_one_token_share_a_forward_pass(folder):
    session = Summing()
    scorer = Scorer(session, folder, CONTEXT)
    scores = [scorer.log_likelihood("w3 w9", f" w{choice}")[0] for choice in (1, 2, 3)]
    assert scores == pytest.approx([LOG_P[12, choice] for choice in (1, 2, 3)], rel=1e-5)
    assert session.passes == 1


def test_without_a_context_the_models_beginning_stands_before_the_text(beginning):
    score, _ = Scorer(Summing(), beginning, CONTEXT).log_likelihood("", words([5, 6]))
    assert score == pytest.approx(sum(log_p([5, 6], [7])), rel=1e-5)


def test_a_model_without_a_beginning_cannot_score_a_text_alone(folder):
    with pytest.raises(MeasureError, match="no beginning-of-sequence token"):
        Scorer(Summing(), folder, CONTEXT).log_likelihood("", "w1 w2")


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 16, 21])
def test_a_rolling_score_predicts_every_token_once_with_full_contexts(beginning, length):
    ids = [(5 * i + 1) % 63 for i in range(length)]
    whole, expected = [7, *ids], 0.0
    for start in range(1, len(whole), CONTEXT):
        end = min(start + CONTEXT, len(whole))
        inputs = whole[max(0, end - 1 - CONTEXT) : end]
        rows = LOG_P[np.cumsum(inputs)[:-1] % 64, inputs[1:]]
        expected += rows[len(rows) - (end - start) :].sum()
    score = Scorer(Summing(), beginning, CONTEXT).rolling_log_likelihood(words(ids))
    assert score == pytest.approx(expected, rel=1e-5)


def test_generation_ends_before_the_first_stop(folder):
    said = list(Summing().generate([3], 4))
    scorer = Scorer(Summing(), folder, CONTEXT)
    assert scorer.continuation("w3", [], 4) == words(said)
    assert scorer.continuation("w3", [f"w{said[2]}", "never"], 4) == f"{words(said[:2])} "


def test_more_tokens_than_the_context_holds_are_refused(folder):
    scorer = Scorer(Summing(), folder, CONTEXT)
    with pytest.raises(MeasureError, match="in a context of 8"):
        scorer.continuation("w3", [], CONTEXT)
    with pytest.raises(MeasureError, match="in a context of 8"):
        scorer.log_likelihood("w3", f" {words(range(9))}")
