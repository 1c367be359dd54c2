from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeopt.core.kernel_times import KernelTimes
from edgeopt.core.target import Device, Limit, Target
from edgeopt.errors import ConfigError

KNOWN = {
    "memory/peak_rss_mib": "MiB",
    "memory/load_mib": "MiB",
    "latency/decode_p50_ms": "ms",
    "quality/perplexity_ratio": "",
}
BOX: dict[str, Any] = {"name": "box", "cpu": "A76", "cores": 4, "ram_bytes": 4 * 2**30}


@pytest.mark.parametrize(
    ("metric", "text", "absolute", "factor"),
    [
        ("memory/peak_rss_mib", "3 GiB", 3072.0, None),
        ("latency/decode_p50_ms", "0.1 s", 100.0, None),
        ("quality/perplexity_ratio", 1.05, 1.05, None),
        ("quality/perplexity_ratio", "5 %", 0.05, None),
        ("memory/peak_rss_mib", "0.5 x baseline", None, 0.5),
        ("memory/peak_rss_mib", "0.5×baseline", None, 0.5),
        ("memory/peak_rss_mib", " .5 * baseline ", None, 0.5),
        ("memory/peak_rss_mib", "1. x baseline", None, 1.0),
    ],
)
def test_limit_is_absolute_or_relative(metric: str, text: Any, absolute: float | None, factor: float | None) -> None:
    limit = Limit.parse(metric, text, KNOWN)
    assert (limit.metric, limit.unit) == (metric, KNOWN[metric])
    assert (limit.absolute, limit.baseline_factor) == (pytest.approx(absolute), factor)


@pytest.mark.parametrize(
    ("text", "absolute", "factor"), [("at least 50 %", 0.5, None), ("at least 0.95 x baseline", None, 0.95)]
)
def test_limit_may_be_a_minimum(text: str, absolute: float | None, factor: float | None) -> None:
    limit = Limit.parse("quality/perplexity_ratio", text, KNOWN)
    assert (limit.absolute, limit.baseline_factor, limit.is_minimum) == (absolute, factor, True)


@pytest.mark.parametrize(
    "text",
    [
        "3",
        "at least",
        "at least at most 3 MiB",
        "least 3 MiB",
        3,
        "3 ms",
        "0 MiB",
        "-1 MiB",
        "0 x baseline",
        "-1 x baseline",
        "1.2.3 x baseline",
        ". x baseline",
        "x baseline",
        "baseline",
        "2 baseline",
        True,
        "",
        [1],
        {"a": 1},
    ],
    ids=str,
)
def test_invalid_limit_names_its_key(text: Any) -> None:
    with pytest.raises(ConfigError, match=r"^limits\.memory\.peak_rss_mib: "):
        Limit.parse("memory/peak_rss_mib", text, KNOWN)


def test_unknown_metric_lists_its_group() -> None:
    with pytest.raises(ConfigError, match="unknown metric 'memory/peak_rss'") as caught:
        Limit.parse("memory/peak_rss", "3 GiB", KNOWN)
    assert caught.value.hint.startswith("Did you mean memory/peak_rss_mib?")
    assert "memory/load_mib" in caught.value.hint
    assert "latency" not in caught.value.hint


@pytest.mark.parametrize(
    ("metric", "suggestion"),
    [
        ("memory/decode_p50_ms", "latency/decode_p50_ms"),
        ("peak_rss_mib", "memory/peak_rss_mib"),
        ("qualty/perplexity_ratio", "quality/perplexity_ratio"),
    ],
)
def test_unknown_metric_suggests_other_groups(metric: str, suggestion: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Limit.parse(metric, "3", KNOWN)
    assert caught.value.hint.startswith(f"Did you mean {suggestion}?")


def test_unknown_group_lists_groups_only() -> None:
    with pytest.raises(ConfigError) as caught:
        Limit.parse("zzz", "3", {**KNOWN, **{f"tasks/metric_{n}": "" for n in range(50)}})
    assert caught.value.hint == "Groups of metrics: latency, memory, quality, tasks"


@pytest.mark.parametrize(
    "text",
    ["0.7 x basline", "0.9x", "2 baseline", "x baseline", "90 % of baseline", "-1 x baseline", "at least 0.9x"],
)
def test_malformed_relative_limit_shows_the_form(text: str) -> None:
    with pytest.raises(ConfigError, match=r"must have the form `0\.7 x baseline`, got ") as caught:
        Limit.parse("memory/peak_rss_mib", text, KNOWN)
    assert repr(text) in caught.value.message


@given(factor=st.floats(0.01, 100), baseline=st.floats(0, 1e9))
def test_relative_bound_scales_the_baseline(factor: float, baseline: float) -> None:
    limit = Limit(metric="m", unit="", baseline_factor=factor)
    assert limit.bound(baseline) == pytest.approx(factor * baseline)
    assert limit.bound(None) is None
    assert Limit(metric="m", unit="", absolute=factor).bound(baseline) == factor


@pytest.mark.parametrize(
    "text", ["3 GiB", "at most 3 GiB", "0.5 x baseline", "at least 3 GiB", "at least 2 x baseline"]
)
def test_formatted_limit_can_be_parsed(text: str) -> None:
    limit = Limit.parse("memory/peak_rss_mib", text, KNOWN)
    assert Limit.parse("memory/peak_rss_mib", str(limit), KNOWN) == limit


def test_fingerprint_ignores_name_of_machine() -> None:
    box = Device(**BOX)
    assert (
        Device(**BOX | {"name": "other", "swap_bytes": 1, "ram_bytes": 4 * 2**30 - 2**20}).fingerprint
        == box.fingerprint
    )
    for other in ({"cpu": "A72"}, {"cores": 2}, {"ram_bytes": 8 * 2**30}):
        assert Device(**BOX | other).fingerprint != box.fingerprint


@pytest.mark.parametrize("values", [{"threads": -1}, {"context_length": 63}])
def test_invalid_target_is_rejected(values: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        Target(name="t", **values)  # type: ignore[arg-type]


def test_kernel_times_require_equal_threads() -> None:
    kernels = KernelTimes(threads=2, matrix={}, layer=(0.0, 0.0, 0.0), token=(0.0, 0.0))
    Target(name="t", kernels=kernels)
    Target(name="t", kernels=kernels, threads=2, device=Device(**BOX))
    for fields in ({"threads": 1}, {"device": Device(**BOX | {"cores": 3})}):
        with pytest.raises(ConfigError, match="got times for 2 threads"):
            Target(name="t", kernels=kernels, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [{"cores": 0}, {"ram_bytes": 0}])
def test_device_needs_cores_and_memory(values: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=rf"^{next(iter(values))}: .*must be at least 1, got 0"):
        Device(**BOX | values)
