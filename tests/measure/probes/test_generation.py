"""Greedy continuations of bigram engines, and the pure functions that judge them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import toy_bench

from edgeopt.core.judge import judge
from edgeopt.core.target import Limit
from edgeopt.errors import ConfigError, MeasureError
from edgeopt.measure.harness.fake_runtime import FakeRuntime
from edgeopt.measure.probes.generation import Generation, loops, repetition

tokens = st.lists(st.integers(0, 5), max_size=80)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """The folder of a measured baseline and its figures."""
    folder = tmp_path_factory.mktemp("baseline")
    return folder, toy_bench.measured(folder, FakeRuntime(), toy_bench.bench("continuations"))


@pytest.fixture(scope="module")
def compressed(tmp_path_factory, baseline):
    folder, references = tmp_path_factory.mktemp("compressed"), {"baseline": baseline[0] / "measured" / "scratch"}
    bench = toy_bench.bench("continuations")
    return folder, toy_bench.measured(folder, FakeRuntime(noise=0.5), bench, references=references)


def samples(folder):
    (run,) = json.loads((folder / "measured" / "samples.json").read_text())["runs"]
    return run["report"]["samples"]["continuations"]


def continued(folder, last, count):
    """`count` tokens after the token `last`, straight from the table."""
    best, found = np.load(folder / "engine" / "table.npy").argmax(axis=-1), []
    for _ in range(count):
        last = int(best[last])
        found.append(last)
    return found


def test_continuations_are_those_of_both_engines_after_the_same_prompts(baseline, compressed):
    taken = samples(compressed[0])
    assert taken["baseline"] == samples(baseline[0])["continuations"]
    assert len(taken["continuations"]) == 8, "one for each window"
    for folder, found in ((compressed[0], taken["continuations"]), (baseline[0], taken["baseline"])):
        assert all(continued(folder, row[0], 63) == row[1:] for row in found)


def test_exact_match_is_the_share_of_equal_continuations(compressed):
    taken, figures = samples(compressed[0]), compressed[1]
    own, reference = np.asarray(taken["continuations"]), np.asarray(taken["baseline"])
    equal = (own == reference).all(axis=1)
    assert 0 < equal.mean() < 1, "the toy shows both"
    assert figures["quality/exact_match"].value == pytest.approx(equal.mean())
    assert figures["quality/exact_match"].count == 8
    assert figures["quality/exact_match"].low < figures["quality/exact_match"].value


def test_an_engine_compared_with_itself_says_the_same(baseline, tmp_path):
    references = {"baseline": baseline[0] / "measured" / "scratch"}
    figures = toy_bench.measured(tmp_path, FakeRuntime(), toy_bench.bench("continuations"), references=references)
    assert figures["quality/exact_match"].low == 1


def test_a_bigram_engine_loops_and_repeats_itself(baseline):
    assert baseline[1]["quality/repetition"].value > 0
    looping = [loops(row) for row in samples(baseline[0])["continuations"]]
    assert baseline[1]["quality/degenerate_share"].value == pytest.approx(np.mean(looping))
    assert any(looping)


def test_without_a_baseline_nothing_relative_is_reported(baseline):
    assert set(baseline[1]) == {"quality/repetition", "quality/degenerate_share"}


def test_a_baseline_without_continuations_leaves_its_limits_broken_and_nothing_else(tmp_path):
    (tmp_path / "old").mkdir()
    figures = toy_bench.measured(
        tmp_path, FakeRuntime(), toy_bench.bench("continuations"), references={"baseline": tmp_path / "old"}
    )
    assert set(figures) == {"quality/repetition", "quality/degenerate_share"}
    limit = Limit.parse("quality/exact_match", "0.9 x baseline", Generation.METRICS)
    (verdict,) = judge(figures.values(), [limit], {})
    assert not verdict.satisfied
    assert verdict.reason == "it was not measured"


def test_a_baseline_that_continued_other_prompts_is_refused(baseline, tmp_path):
    with pytest.raises(MeasureError, match="continued other prompts"):
        toy_bench.measured(
            tmp_path,
            FakeRuntime(),
            toy_bench.bench("continuations"),
            evaluation=toy_bench.text(seed=9),
            references={"baseline": baseline[0] / "measured" / "scratch"},
        )


def test_where_the_context_is_too_short_for_a_loop_none_is_denied(tmp_path):
    target = replace(toy_bench.TARGET, context_length=72)
    figures = toy_bench.measured(
        tmp_path, FakeRuntime(), toy_bench.bench("continuations", prompt_lengths=(64,)), target=target
    )
    assert set(figures) == {"quality/repetition"}
    assert "up to 8 tokens" in figures["quality/repetition"].method


@pytest.mark.parametrize("values", [{"prompts": 0}, {"tokens": 15}, {"processes": 0}])
def test_too_few_of_anything_are_refused(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        Generation(**values)


@pytest.mark.parametrize(
    ("given_tokens", "expected"),
    [([1, 2, 3], [0, 0]), ([1, 2, 3, 4], [0, 1]), ([1, 1, 1, 1, 1, 1], [2, 3]), ([1, 2, 3, 4, 1, 2, 3, 4], [1, 5])],
)
def test_repetition_counts_four_grams_seen_before(given_tokens, expected):
    assert repetition(given_tokens) == expected


@given(tokens)
def test_a_loop_is_an_end_that_its_own_cycle_repeated_gives(sequence):
    """The definition written out: some end of the sequence equals a cycle repeated and cut to its length."""
    ends = [sequence[i:] for i in range(len(sequence))]
    expected = any(
        end == (end[:cycle] * len(end))[: len(end)]
        for end in ends
        for cycle in range(1, 17)
        if len(end) >= max(3 * cycle, 16)
    )
    assert loops(sequence) == expected


@given(tokens, st.lists(st.integers(0, 5), min_size=1, max_size=16), st.integers(0, 15))
def test_whatever_comes_before_a_cycle_said_often_enough_is_a_loop_until_something_else_is_said(start, cycle, cut):
    said = start + cycle * max(3, -(-16 // len(cycle))) + cycle[:cut]
    assert loops(said)
    assert not loops([*said, 6])


@pytest.mark.parametrize(
    "sequence",
    [[], [1] * 15, list(range(64)), [1] * 40 + [2], list(range(17)) * 4, list(range(8)) * 2 + list(range(7))],
    ids=["nothing", "a short ruler", "no repetition", "a ruler within", "a cycle too long", "not yet three rounds"],
)
def test_what_is_no_loop(sequence):
    assert not loops(sequence)
