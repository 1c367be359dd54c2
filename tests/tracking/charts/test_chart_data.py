from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import samples

from edgeopt.core.study_snapshot import TrialSnapshot
from edgeopt.tracking import front
from edgeopt.tracking.charts import plotly
from edgeopt.tracking.charts.chart_data import ChartData, build_chart_data, place_labels

TRIALS = samples.invented_trials()
FRONT = [trial for trial in TRIALS if trial.on_front]


def view(trials: Sequence[TrialSnapshot] = TRIALS, **changed: Any) -> ChartData:
    return build_chart_data(samples.snapshot(trials, **changed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("front")
    front.write(made, samples.snapshot(study="a <b> study"))
    return made


def test_chart_shows_each_measured_trial_once() -> None:
    drawn = [trace for trace in plotly.figure(view()).data if trace.mode == "markers"]
    numbers = sorted(int(text.split("Trial ")[1].split("<")[0]) for trace in drawn for text in trace.customdata)
    assert numbers == [trial.number for trial in TRIALS if trial.metrics]


def test_limits_are_drawn_and_labelled() -> None:
    layout = plotly.figure(view()).layout
    lines = {(shape.x0, shape.y0) for shape in layout.shapes if shape.type == "line"}
    words = [note.text for note in layout.annotations]
    assert (1.15, 0) in lines
    assert (0, 1.04) in lines
    assert "limit 1.15" in words
    assert "limit 1.04 ms" in words


def test_front_trials_are_labelled() -> None:
    words = {note.text for note in plotly.figure(view()).layout.annotations}
    members = {f"<b>#{trial.number}</b>" for trial in FRONT}
    assert members
    assert members <= words


def test_distant_limit_does_not_extend_the_axis() -> None:
    far = [replace(samples.LIMITS[1], bound=500.0)]
    made = view(limits=far)
    assert made.y.high < 2
    assert "limit 500 ms is outside the chart" in [note.text for note in plotly.figure(made).layout.annotations]


def test_front_line_joins_undominated_trials() -> None:
    path = view().front_line
    assert [p.x for p in path] == sorted(p.x for p in path)
    assert [p.y for p in path] == sorted((p.y for p in path), reverse=True)
    others = [p for p in view().points_of("front") if p not in path]
    assert all(any(q.x <= p.x and q.y <= p.y for q in path) for p in others)


def test_maximized_axis_reverses_front_line() -> None:
    objectives = [replace(samples.OBJECTIVES[0], direction="maximize"), samples.OBJECTIVES[1]]
    path = view(objectives=objectives).front_line
    assert [p.y for p in path] == sorted(p.y for p in path)


@pytest.mark.parametrize(
    "changed",
    [
        {"trials": []},
        {"objectives": samples.OBJECTIVES[:1]},
        {"objectives": samples.OBJECTIVES[:2], "limits": []},
        {"trials": [replace(trial, feasible=False, pareto_rank=None) for trial in TRIALS]},
        {"trials": TRIALS[:1]},
        {"limits": [replace(samples.LIMITS[0], bound=None)]},
    ],
    ids=["no trials", "one objective", "no limits", "none feasible", "one trial", "no baseline"],
)
def test_unusual_studies_are_drawn(tmp_path: Path, changed: dict[str, Any]) -> None:
    front.write(tmp_path, samples.snapshot(**{"trials": TRIALS, **changed}))
    assert (tmp_path / "front.png").stat().st_size > 10_000


def test_report_is_self_contained_and_complete(folder: Path) -> None:
    page = (folder / "front.html").read_text()
    visible = page.split("<h2>")[-1]
    assert 'src="http' not in page
    assert "a &lt;b&gt; study" in page
    assert "build: BuildError: out of memory" in visible
    assert all(f"<td class='n'>{trial.number}</td>" in visible for trial in TRIALS)
    assert "at most 0.8 x baseline" in page


def test_pdf_has_chart_and_table(folder: Path) -> None:
    document = (folder / "front.pdf").read_bytes()
    assert document.startswith(b"%PDF-")
    assert document.count(b"/Type /Page\n") + document.count(b"/Type /Page ") == 2


def test_pdf_splits_a_long_table_into_pages(tmp_path: Path) -> None:
    front.write(tmp_path, samples.snapshot(samples.invented_trials(80)))
    document = (tmp_path / "front.pdf").read_bytes()
    assert document.count(b"/Type /Page\n") + document.count(b"/Type /Page ") == 4


def test_pdf_table_lists_original_model_and_trials() -> None:
    trials = [replace(trial, baseline=samples.BASELINE) for trial in TRIALS]
    headers, rows = front.trial_rows(samples.snapshot(trials))
    assert headers[:3] == ["trial", "outcome", "quality: perplexity ratio"]
    assert rows[0][:4] == ["–", "original model", "1", "1.3 ms"]
    assert sorted(int(row[0]) for row in rows[1:]) == [trial.number for trial in TRIALS]
    assert rows[1][1] == "on the front"


def test_tables_contain_every_trial(folder: Path) -> None:
    with (folder / "front.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [int(line["number"]) for line in lines] == [trial.number for trial in TRIALS]
    assert [line["outcome"] for line in lines] == [trial.outcome_text for trial in TRIALS]
    assert float(lines[0]["metrics.latency/decode_p50_ms"]) == TRIALS[0].metrics["latency/decode_p50_ms"]
    assert len(json.loads((folder / "trials.json").read_text())["trials"]) == len(TRIALS)


def test_csv_contains_confidence_intervals(tmp_path: Path) -> None:
    trial = replace(TRIALS[0], intervals={"latency/decode_p50_ms": (0.5, 0.75)})
    front.write_csv(tmp_path / "front.csv", samples.snapshot([trial, TRIALS[1]]))
    with (tmp_path / "front.csv").open() as file:
        first, second = csv.DictReader(file)
    assert (first["metrics.latency/decode_p50_ms.low"], first["metrics.latency/decode_p50_ms.high"]) == ("0.5", "0.75")
    assert second["metrics.latency/decode_p50_ms.low"] == ""


def test_original_model_and_intervals_are_drawn(tmp_path: Path) -> None:
    interval = {"latency/decode_p50_ms": (0.4, 0.9)}
    trials = [replace(trial, baseline=samples.BASELINE, intervals=interval) for trial in TRIALS]
    seen = view(trials)
    assert seen.baseline == (1.0, 1.3)
    assert seen.y.low < 1.3 < seen.y.high
    assert {point.y_interval for point in seen.points} == {(0.4, 0.9)}
    traces = {trace.name: trace for trace in plotly.figure(seen).data if trace.name}
    assert list(traces["original model"].y) == [1.3]
    point = seen.points_of("front")[0]
    assert traces["on the front"].error_y.array[0] == pytest.approx(0.9 - point.y)
    front.write(tmp_path, samples.snapshot(trials))
    assert "original model" in (tmp_path / "front.html").read_text()


def test_baselines_that_differ_are_not_drawn() -> None:
    other = {**samples.BASELINE, "latency/decode_p50_ms": 9.0}
    trials = [replace(TRIALS[0], baseline=samples.BASELINE), replace(TRIALS[1], baseline=other)]
    assert view(trials).baseline is None


def test_totals_use_best_feasible_values() -> None:
    objectives = (samples.OBJECTIVES[0], replace(samples.OBJECTIVES[1], direction="maximize"))
    found = front.totals(samples.snapshot(TRIALS, objectives=objectives))
    feasible = [trial.metrics for trial in TRIALS if trial.feasible]
    assert found["trials"] == len(TRIALS)
    assert found["trials_failed"] == 1
    assert found["trials_feasible"] == len(feasible)
    assert found["best/quality/perplexity_ratio"] == min(m["quality/perplexity_ratio"] for m in feasible)
    assert found["best/latency/decode_p50_ms"] == max(m["latency/decode_p50_ms"] for m in feasible)


@given(st.lists(st.tuples(st.floats(0, 800), st.floats(0, 500)), min_size=1, max_size=6, unique=True))
def test_labels_stay_in_the_frame(anchors: list[tuple[float, float]]) -> None:
    places = place_labels(anchors, [(30, 18)] * len(anchors), [], (0, 0, 800, 500))
    assert all(15 <= x <= 785 and 9 <= y <= 491 for x, y in places)


def test_labels_of_equal_points_do_not_overlap() -> None:
    places = place_labels([(400.0, 250.0)] * 6, [(30, 18)] * 6, [], (0, 0, 800, 500))
    clear = [abs(a[0] - b[0]) >= 30 or abs(a[1] - b[1]) >= 18 for i, a in enumerate(places) for b in places[i + 1 :]]
    assert all(clear)
