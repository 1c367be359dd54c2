"""Test greedy continuations of bigram engines and the functions that analyze them."""

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
from edgeopt.measure.probes.generation import Generation, count_repeated_ngrams, ends_in_loop

tokens = st.lists(st.integers(0, 5), max_size=80)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """Return the folder of a measured baseline and its measurements by metric."""
    folder = tmp_path_factory.mktemp("baseline")
    return folder, toy_bench.build_and_measure(folder, FakeRuntime(), toy_bench.make_bench("continuations"))


@pytest.fixture(scope="module")
def compressed(tmp_path_factory, baseline):
    folder, references = tmp_path_factory.mktemp("compressed"), {"baseline": baseline[0] / "measured" / "scratch"}
    bench = toy_bench.make_bench("continuations")
    return folder, toy_bench.build_and_measure(folder, FakeRuntime(noise=0.5), bench, references=references)


def samples(folder):
    (run,) = json.loads((folder / "measured" / "samples.json").read_text())["runs"]
    return run["report"]["samples"]["continuations"]


def expected_tokens(folder, last, count):
    """Return the `count` greedy tokens that follow the token `last`, computed from the table."""
    successor, tokens = np.load(folder / "engine" / "table.npy").argmax(axis=-1), []
    for _ in range(count):
        last = int(successor[last])
        tokens.append(last)
    return tokens


def test_continuations_of_both_engines_are_recorded(baseline, compressed):
    recorded = samples(compressed[0])
    assert recorded["baseline"] == samples(baseline[0])["continuations"]
    assert len(recorded["continuations"]) == 8, "one per window"
    for folder, continuations in ((compressed[0], recorded["continuations"]), (baseline[0], recorded["baseline"])):
        assert all(expected_tokens(folder, row[0], 63) == row[1:] for row in continuations)


def test_exact_match_is_share_of_equal_continuations(compressed):
    recorded, measurements = samples(compressed[0]), compressed[1]
    own, reference = np.asarray(recorded["continuations"]), np.asarray(recorded["baseline"])
    equal = (own == reference).all(axis=1)
    assert 0 < equal.mean() < 1, "both cases occur"
    assert measurements["quality/exact_match"].value == pytest.approx(equal.mean())
    assert measurements["quality/exact_match"].count == 8
    assert measurements["quality/exact_match"].low < measurements["quality/exact_match"].value


def test_engine_matches_itself_exactly(baseline, tmp_path):
    references = {"baseline": baseline[0] / "measured" / "scratch"}
    measurements = toy_bench.build_and_measure(
        tmp_path, FakeRuntime(), toy_bench.make_bench("continuations"), references=references
    )
    assert measurements["quality/exact_match"].low == 1


def test_bigram_engine_loops_and_repeats(baseline):
    assert baseline[1]["quality/repetition"].value > 0
    looping = [ends_in_loop(row) for row in samples(baseline[0])["continuations"]]
    assert baseline[1]["quality/degenerate_share"].value == pytest.approx(np.mean(looping))
    assert any(looping)


def test_relative_metrics_need_a_baseline(baseline):
    assert set(baseline[1]) == {"quality/repetition", "quality/degenerate_share"}


def test_baseline_without_continuations_breaks_its_limit(tmp_path):
    (tmp_path / "old").mkdir()
    measurements = toy_bench.build_and_measure(
        tmp_path, FakeRuntime(), toy_bench.make_bench("continuations"), references={"baseline": tmp_path / "old"}
    )
    assert set(measurements) == {"quality/repetition", "quality/degenerate_share"}
    limit = Limit.parse("quality/exact_match", "0.9 x baseline", Generation.METRICS)
    (verdict,) = judge(measurements.values(), [limit], {})
    assert not verdict.satisfied
    assert verdict.reason == "not measured"


def test_baseline_with_other_prompts_is_rejected(baseline, tmp_path):
    with pytest.raises(MeasureError, match="got other prompts"):
        toy_bench.build_and_measure(
            tmp_path,
            FakeRuntime(),
            toy_bench.make_bench("continuations"),
            evaluation=toy_bench.make_text(seed=9),
            references={"baseline": baseline[0] / "measured" / "scratch"},
        )


def test_short_continuations_report_no_loops(tmp_path):
    target = replace(toy_bench.TARGET, context_length=72)
    measurements = toy_bench.build_and_measure(
        tmp_path, FakeRuntime(), toy_bench.make_bench("continuations", prompt_lengths=(64,)), target=target
    )
    assert set(measurements) == {"quality/repetition"}
    assert "up to 8 tokens" in measurements["quality/repetition"].method


@pytest.mark.parametrize("values", [{"prompts": 0}, {"tokens": 15}, {"processes": 0}])
def test_values_below_minimum_are_rejected(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        Generation(**values)


@pytest.mark.parametrize(
    ("sequence", "expected"),
    [([1, 2, 3], [0, 0]), ([1, 2, 3, 4], [0, 1]), ([1, 1, 1, 1, 1, 1], [2, 3]), ([1, 2, 3, 4, 1, 2, 3, 4], [1, 5])],
)
def test_repeated_four_grams_are_counted(sequence, expected):
    assert count_repeated_ngrams(sequence) == expected


@given(tokens)
def test_loop_matches_its_definition(sequence):
    """Compare with the definition: a suffix equals its first tokens, repeated and cut to its length."""
    suffixes = [sequence[i:] for i in range(len(sequence))]
    expected = any(
        suffix == (suffix[:cycle] * len(suffix))[: len(suffix)]
        for suffix in suffixes
        for cycle in range(1, 17)
        if len(suffix) >= max(3 * cycle, 16)
    )
    assert ends_in_loop(sequence) == expected


@given(tokens, st.lists(st.integers(0, 5), min_size=1, max_size=16), st.integers(0, 15))
def test_any_prefix_with_repeated_cycle_is_a_loop(prefix, cycle, cut):
    looping = prefix + cycle * max(3, -(-16 // len(cycle))) + cycle[:cut]
    assert ends_in_loop(looping)
    assert not ends_in_loop([*looping, 6])


@pytest.mark.parametrize(
    "sequence",
    [[], [1] * 15, list(range(64)), [1] * 40 + [2], list(range(17)) * 4, list(range(8)) * 2 + list(range(7))],
    ids=["empty", "short line", "no repetition", "line inside", "cycle too long", "fewer than three cycles"],
)
def test_other_sequences_are_not_loops(sequence):
    assert not ends_in_loop(sequence)
