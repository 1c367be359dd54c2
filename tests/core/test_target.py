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
    ("metric", "text", "at_most", "factor"),
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
def test_a_limit_is_a_quantity_or_a_multiple_of_the_baseline(
    metric: str, text: Any, at_most: float | None, factor: float | None
) -> None:
    limit = Limit.parse(metric, text, KNOWN)
    assert (limit.metric, limit.unit) == (metric, KNOWN[metric])
    assert (limit.absolute, limit.baseline_factor) == (pytest.approx(at_most), factor)


@pytest.mark.parametrize(
    ("text", "absolute", "factor"), [("at least 50 %", 0.5, None), ("at least 0.95 x baseline", None, 0.95)]
)
def test_a_limit_may_hold_from_below(text: str, absolute: float | None, factor: float | None) -> None:
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
def test_a_limit_that_cannot_be_meant_names_its_key(text: Any) -> None:
    with pytest.raises(ConfigError, match=r"^limits\.memory\.peak_rss_mib: "):
        Limit.parse("memory/peak_rss_mib", text, KNOWN)


def test_an_unknown_metric_is_told_with_those_of_its_group() -> None:
    with pytest.raises(ConfigError, match="unknown metric 'memory/peak_rss'") as caught:
        Limit.parse("memory/peak_rss", "3 GiB", KNOWN)
    assert "memory/peak_rss_mib" in caught.value.hint
    assert "latency" not in caught.value.hint


@given(factor=st.floats(0.01, 100), baseline=st.floats(0, 1e9))
def test_a_relative_limit_is_bound_by_the_baseline(factor: float, baseline: float) -> None:
    limit = Limit(metric="m", unit="", baseline_factor=factor)
    assert limit.bound(baseline) == pytest.approx(factor * baseline)
    assert limit.bound(None) is None
    assert Limit(metric="m", unit="", absolute=factor).bound(baseline) == factor


@pytest.mark.parametrize(
    "text", ["3 GiB", "at most 3 GiB", "0.5 x baseline", "at least 3 GiB", "at least 2 x baseline"]
)
def test_a_limit_shown_can_be_parsed_again(text: str) -> None:
    limit = Limit.parse("memory/peak_rss_mib", text, KNOWN)
    assert Limit.parse("memory/peak_rss_mib", str(limit), KNOWN) == limit


def test_a_fingerprint_is_of_the_kind_of_machine_and_not_of_its_name() -> None:
    box = Device(**BOX)
    assert (
        Device(**BOX | {"name": "other", "swap_bytes": 1, "ram_bytes": 4 * 2**30 - 2**20}).fingerprint
        == box.fingerprint
    )
    for other in ({"cpu": "A72"}, {"cores": 2}, {"ram_bytes": 8 * 2**30}):
        assert Device(**BOX | other).fingerprint != box.fingerprint


@pytest.mark.parametrize("values", [{"threads": -1}, {"context_length": 63}])
def test_a_target_that_cannot_run_is_refused(values: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        Target(name="t", **values)  # type: ignore[arg-type]


def test_kernels_hold_for_the_threads_that_they_were_timed_with() -> None:
    timed = KernelTimes(threads=2, matrix={}, layer=(0.0, 0.0, 0.0), token=(0.0, 0.0))
    Target(name="t", kernels=timed)
    Target(name="t", kernels=timed, threads=2, device=Device(**BOX))
    for fields in ({"threads": 1}, {"device": Device(**BOX | {"cores": 3})}):
        with pytest.raises(ConfigError, match="timed with 2 threads"):
            Target(name="t", kernels=timed, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [{"cores": 0}, {"ram_bytes": 0}])
def test_a_device_without_cores_or_memory_is_refused(values: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        Device(**BOX | values)
