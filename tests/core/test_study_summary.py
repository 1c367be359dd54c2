"""Test the words that compare a trial with the original model."""

from __future__ import annotations

import pytest

from edgeopt.core.study_summary import _relative


@pytest.mark.parametrize(
    ("metric", "change", "words"),
    [
        ("size/engine_mib", -0.76, "76 % smaller"),
        ("latency/decode_ms", 0.4, "40 % slower"),
        ("throughput/decode_tokens_per_s", 0.4, "40 % faster"),
        ("throughput/decode_tokens_per_s", -0.25, "25 % slower"),
        ("memory/peak_rss_mib", -0.3, "30 % lower peak RSS"),
        ("quality/perplexity", 0.032, "3.2 % higher perplexity"),
        ("quality/perplexity", 0.004, "same perplexity"),
    ],
)
def test_change_is_stated_in_words(metric: str, change: float, words: str) -> None:
    assert _relative(metric, change) == words
