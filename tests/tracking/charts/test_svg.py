from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
from support import samples

from edgeopt.core.study_snapshot import TrialSnapshot
from edgeopt.tracking.charts import svg
from edgeopt.tracking.charts.chart_data import ChartData, build_chart_data


def view(trials: Sequence[TrialSnapshot] | None = None, **changed: Any) -> ChartData:
    return build_chart_data(samples.snapshot(trials, **changed))


def drawn(seen: ChartData) -> ET.Element:
    return ET.fromstring(svg.figure(seen, lambda trial: f"/runs/{trial.number}?a=1&b='2'"))


def test_plotted_trials_are_described_links() -> None:
    seen = view()
    links = drawn(seen).findall("a")
    assert sorted(link.get("href") for link in links) == sorted(f"/runs/{p.number}?a=1&b='2'" for p in seen.points)
    for link in links:
        told = link.get("aria-label") or ""
        assert "quality: perplexity ratio" in told
        assert "step.quantize.bits = " in told
        assert link.findtext("title") == told, "who hovers reads the same"


def test_points_match_axis_ticks() -> None:
    seen = view()
    picture = drawn(seen)
    ticks = {
        float(text.text or ""): float(text.get("x") or "")
        for text in picture.findall("text")
        if text.get("text-anchor") == "middle" and (text.text or "").replace(".", "").isdigit()
    }
    (low, at_low), (high, at_high) = min(ticks.items()), max(ticks.items())
    point = seen.points_of("front")[0]
    link = next(a for a in picture.findall("a") if f"trial {point.number}," in (a.get("aria-label") or ""))
    circle = link.find("circle")
    assert circle is not None
    expected = at_low + (point.x - low) / (high - low) * (at_high - at_low)
    assert float(circle.get("cx") or "") == pytest.approx(expected, abs=0.2)


def test_limits_are_drawn_and_labelled() -> None:
    words = [text.text for text in drawn(view()).findall("text")]
    assert "limit 1.15" in words
    assert "limit 1.04 ms" in words


def test_recipe_text_is_escaped_in_svg() -> None:
    params = {"<script>": "'/><script>alert(1)</script>"}
    trials = [replace(trial, params=params) for trial in samples.invented_trials()]
    assert drawn(view(trials)).find(".//script") is None


def test_trials_without_run_have_no_link() -> None:
    picture = ET.fromstring(svg.figure(view(), lambda _: ""))
    assert picture.findall("a") == []
    assert len(picture.findall("g")) == len(view().points)


def test_labels_of_close_points_are_legible() -> None:
    trials = samples.invented_trials()
    member = next(trial for trial in trials if trial.on_front)
    trials += [replace(member, number=number) for number in (100, 101, 102)]
    names = drawn(view(trials)).findall(".//text[@class='name']")
    assert {"100", "101", "102"} < {name.text for name in names}
    boxes = [(float(name.attrib["x"]), float(name.attrib["y"]), 8 * len(str(name.text))) for name in names]
    for (x, y, width), (other_x, other_y, other_width) in combinations(boxes, 2):
        assert abs(x - other_x) >= (width + other_width) / 2 or abs(y - other_y) >= 12


@pytest.mark.parametrize(
    ("values", "expected"), [((0.0, 10.0), [0, 2, 4, 6, 8, 10]), ((0.1, 0.13), [0.1, 0.11, 0.12, 0.13])]
)
def test_ticks_are_round_numbers(values: tuple[float, float], expected: list[float]) -> None:
    trials = [samples.trial(n, samples.result(decode_ms=v, ratio=1.0 + n), None, 1) for n, v in enumerate(values)]
    axis = view(trials, limits=[]).y
    found = svg.round_ticks(axis.low, axis.high, 6)
    assert all(axis.low <= tick <= axis.high for tick in found)
    assert set(expected) <= set(found)


def test_original_model_and_intervals_are_drawn() -> None:
    interval = {"latency/decode_p50_ms": (0.4, 0.9)}
    trials = [replace(t, baseline=samples.BASELINE, intervals=interval) for t in samples.invented_trials()]
    picture = drawn(view(trials))
    diamond = picture.find(".//g[@class='baseline']")
    assert diamond is not None
    assert diamond.findtext("title") == "original model: quality: perplexity ratio 1, latency: decode p50 1.3 ms"
    bars = picture.findall(".//line[@class='interval']")
    assert len(bars) == len(view(trials).points)


def test_hypervolume_chart_has_labelled_axes() -> None:
    picture = ET.fromstring(svg.hypervolume_chart((0.0, 0.1, 0.1, 0.25)))
    texts = [text.text for text in picture.findall("text")]
    assert {"hypervolume", "evaluated trials"} <= set(texts)
    assert {"1", "2", "3", "4"} <= set(texts), "ticks of the x axis are trials"
    assert "0.2" in texts, "ticks of the y axis"
    line = picture.find("polyline")
    assert line is not None
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert points[0][1] > points[1][1] == points[2][1] > points[3][1], "larger values are higher"


def test_hypervolume_chart_draws_one_trial() -> None:
    picture = ET.fromstring(svg.hypervolume_chart((0.5,)))
    assert picture.find("path") is not None
