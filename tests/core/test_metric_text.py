from __future__ import annotations

import pytest

from edgeopt.config.parse import known_metrics
from edgeopt.core.metric_text import explain, readable


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("memory/peak_rss_mib", "memory: peak RSS"),
        ("latency/decode_p50_ms", "latency: decode p50"),
        ("throughput/decode_tokens_per_s", "throughput: decode"),
        ("quality/kl_mean", "quality: KL mean"),
    ],
)
def test_metric_is_readable(metric: str, words: str) -> None:
    assert readable(metric) == words


@pytest.mark.parametrize(
    "metric",
    ["size/engine_mib", "latency/decode_p95_ms", "latency/ttft_64_ms", "quality/kl_mean", "memory/peak_rss_mib"],
)
def test_frequent_metric_is_explained(metric: str) -> None:
    assert metric in known_metrics(None)
    assert explain(metric).endswith(".")


def test_unknown_metric_has_no_explanation() -> None:
    assert explain("other/metric") == ""
