"""Test the words that compare a trial with the original model."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support import samples

from edgeopt.core.study_snapshot import ObjectiveSnapshot
from edgeopt.core.study_summary import _relative, comparison


@pytest.mark.parametrize(
    ("metric", "change", "words"),
    [
        ("size/engine_mib", -0.76, "76 % smaller"),
        ("latency/decode_ms", 0.4, "40 % slower"),
        ("throughput/decode_tokens_per_s", 0.4, "40 % faster"),
        ("throughput/decode_tokens_per_s", -0.25, "25 % slower"),
        ("memory/peak_rss_mib", -0.3, "30 % lower peak RSS"),
        ("quality/perplexity", 0.032, "3.2 % higher perplexity"),
        ("quality/perplexity", 0.004, "the same perplexity"),
        ("size/engine_mib", 0.001, "the same size"),
    ],
)
def test_change_is_stated_in_words(metric: str, change: float, words: str) -> None:
    assert _relative(metric, change) == words


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"size/engine_mib": 0.5, "latency/decode_p50_ms": 0.75}, "is 50 % smaller and 25 % faster"),
        ({"size/engine_mib": 0.5, "quality/perplexity": 1.25}, "is 50 % smaller, with 25 % higher perplexity"),
        (
            {"quality/perplexity": 1.25, "memory/peak_rss_mib": 0.5},
            "has 25 % higher perplexity and 50 % lower peak RSS",
        ),
        ({"size/engine_mib": 1.0}, "has the same size"),
        ({}, ""),
    ],
)
def test_trial_is_compared_with_its_baseline(changes: dict[str, float], phrase: str) -> None:
    objectives = [ObjectiveSnapshot(metric=metric, unit="", direction="minimize") for metric in changes]
    trial = replace(samples.invented_trials(1)[0], metrics=changes, baseline=dict.fromkeys(changes, 1.0))
    assert comparison(trial, objectives) == phrase
