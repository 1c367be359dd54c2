from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import samples

from edgeopt.tracking import front
from edgeopt.tracking.charts import plotly
from edgeopt.tracking.charts.chart_data import place_labels, prepare, readable

ROWS = samples.rows()


def view(**changed: Any) -> Any:
    shape = {"rows": ROWS, "objectives": samples.OBJECTIVES, "limits": samples.LIMITS} | changed
    return prepare(study="s", **shape)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("front")
    front.write(made, study="a <b> study", rows=ROWS, objectives=samples.OBJECTIVES, limits=samples.LIMITS)
    return made


def test_the_chart_holds_every_measured_trial_once() -> None:
    drawn = [trace for trace in plotly.figure(view()).data if trace.mode == "markers"]
    numbers = sorted(int(text.split("Trial ")[1].split("<")[0]) for trace in drawn for text in trace.customdata)
    assert numbers == [row["number"] for row in ROWS if row["metrics"]]


def test_limits_are_drawn_and_named() -> None:
    layout = plotly.figure(view()).layout
    lines = {(shape.x0, shape.y0) for shape in layout.shapes if shape.type == "line"}
    words = [note.text for note in layout.annotations]
    assert (1.15, 0) in lines
    assert (0, 1.04) in lines
    assert "limit 1.15" in words
    assert "limit 1.04 ms" in words


def test_every_member_of_the_front_is_labelled() -> None:
    words = {note.text for note in plotly.figure(view()).layout.annotations}
    members = {f"<b>#{row['number']}</b>" for row in ROWS if row["pareto_rank"] == 1}
    assert members
    assert members <= words


def test_a_distant_limit_is_named_and_does_not_squeeze_the_points() -> None:
    far = [{**samples.LIMITS[1], "bound": 500.0}]
    made = view(limits=far)
    assert made.y.high < 2
    assert "limit 500 ms lies outside" in [note.text for note in plotly.figure(made).layout.annotations]


def test_the_path_joins_members_that_none_beats_on_the_two_axes() -> None:
    path = view().path
    assert [p.x for p in path] == sorted(p.x for p in path)
    assert [p.y for p in path] == sorted((p.y for p in path), reverse=True)
    others = [p for p in view().of("front") if p not in path]
    assert all(any(q.x <= p.x and q.y <= p.y for q in path) for p in others)


def test_a_larger_is_better_axis_turns_the_path() -> None:
    objectives = [{**samples.OBJECTIVES[0], "direction": "maximize"}, samples.OBJECTIVES[1]]
    path = view(objectives=objectives).path
    assert [p.y for p in path] == sorted(p.y for p in path)


@pytest.mark.parametrize(
    "changed",
    [
        {"rows": []},
        {"objectives": samples.OBJECTIVES[:1]},
        {"objectives": samples.OBJECTIVES[:2], "limits": []},
        {"rows": [{**row, "feasible": False, "pareto_rank": None} for row in ROWS]},
        {"rows": ROWS[:1]},
        {"limits": [{**samples.LIMITS[0], "bound": None}]},
    ],
    ids=["no trials", "one objective", "no limits", "none feasible", "one trial", "no baseline"],
)
def test_odd_studies_are_drawn_too(tmp_path: Path, changed: dict[str, Any]) -> None:
    shape = {"rows": ROWS, "objectives": samples.OBJECTIVES, "limits": samples.LIMITS} | changed
    front.write(tmp_path, study="s", **shape)
    assert (tmp_path / "front.png").stat().st_size > 10_000


def test_the_page_is_self_contained_and_tells_of_all_trials(folder: Path) -> None:
    page = (folder / "front.html").read_text()
    visible = page.split("<h2>")[-1]
    assert 'src="http' not in page
    assert "a &lt;b&gt; study" in page
    assert "build: BuildError: out of memory" in visible
    assert all(f"<td class='n'>{row['number']}</td>" in visible for row in ROWS)
    assert "at most 0.8 x baseline" in page


def test_tables_hold_the_front_and_everything(folder: Path) -> None:
    with (folder / "front.csv").open() as file:
        lines = list(csv.DictReader(file))
    members = [row for row in ROWS if row["pareto_rank"] == 1]
    assert [int(line["number"]) for line in lines] == [row["number"] for row in members]
    assert float(lines[0]["metrics.latency/decode_p50_ms"]) == members[0]["metrics"]["latency/decode_p50_ms"]
    assert len(json.loads((folder / "trials.json").read_text())["trials"]) == len(ROWS)


def test_totals_count_and_take_the_best_of_the_feasible() -> None:
    found = front.totals(ROWS, [*samples.OBJECTIVES[:1], {**samples.OBJECTIVES[1], "direction": "maximize"}])
    feasible = [row["metrics"] for row in ROWS if row["feasible"]]
    assert found["trials"] == len(ROWS)
    assert found["trials_failed"] == 1
    assert found["trials_feasible"] == len(feasible)
    assert found["best/quality/perplexity_ratio"] == min(m["quality/perplexity_ratio"] for m in feasible)
    assert found["best/latency/decode_p50_ms"] == max(m["latency/decode_p50_ms"] for m in feasible)


@given(st.lists(st.tuples(st.floats(0, 800), st.floats(0, 500)), min_size=1, max_size=6, unique=True))
def test_labels_stay_in_the_frame(anchors: list[tuple[float, float]]) -> None:
    places = place_labels(anchors, [(30, 18)] * len(anchors), [], (0, 0, 800, 500))
    assert all(15 <= x <= 785 and 9 <= y <= 491 for x, y in places)


def test_labels_of_points_at_one_place_do_not_overlap() -> None:
    places = place_labels([(400.0, 250.0)] * 6, [(30, 18)] * 6, [], (0, 0, 800, 500))
    clear = [abs(a[0] - b[0]) >= 30 or abs(a[1] - b[1]) >= 18 for i, a in enumerate(places) for b in places[i + 1 :]]
    assert all(clear)


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("memory/peak_rss_mib", "memory: peak RSS"),
        ("latency/decode_p50_ms", "latency: decode p50"),
        ("throughput/decode_tokens_per_s", "throughput: decode"),
        ("quality/kl_mean", "quality: KL mean"),
    ],
)
def test_metrics_are_named_for_people(metric: str, words: str) -> None:
    assert readable(metric) == words
