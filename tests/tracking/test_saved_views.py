"""Test saved views of MLflow's runs page: their state, and their charts in a browser."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import browser, samples

from edgeopt.core.study_snapshot import ObjectiveSnapshot, TrialSnapshot
from edgeopt.tracking import saved_views
from edgeopt.tracking.recorder import MlflowRecorder

TRIALS = samples.invented_trials(8)


def states(
    trials: Sequence[TrialSnapshot] = TRIALS, objectives: Sequence[ObjectiveSnapshot] = samples.OBJECTIVES
) -> dict[str, dict[str, Any]]:
    found = saved_views.build_views(samples.snapshot(trials, objectives=objectives))
    return {view.name: dict(view.state) for view in found}


def charts(state: dict[str, Any]) -> list[str]:
    return [chart["type"] for chart in state["compareRunCharts"]]


def test_study_has_views_of_front_and_limits() -> None:
    found = states()
    assert {name: charts(state) for name, state in found.items()} == {
        "front": ["CONTOUR", "SCATTER", "SCATTER"],
        "parameters": ["PARALLEL"],
        "limits": ["BAR"] * 3,
    }
    coloured = found["front"]["compareRunCharts"][0]
    assert [coloured[axis]["key"] for axis in ("xaxis", "yaxis", "zaxis")] == [o.metric for o in samples.OBJECTIVES]
    assert found["parameters"]["compareRunCharts"][0]["selectedParams"] == [
        "lora",
        "step.prune.ratio",
        "step.quantize.bits",
    ]


def test_front_view_shows_only_feasible_trials() -> None:
    found = states()
    assert "metrics.`feasible` = 1" in found["front"]["searchFilter"]
    assert "feasible" not in found["limits"]["searchFilter"]


def test_measured_energy_has_a_view() -> None:
    metrics = {**TRIALS[0].metrics, "energy/estimated/power_w": 3.0}
    assert charts(states([replace(TRIALS[0], metrics=metrics)])["energy"]) == ["BAR"]


def test_two_feasible_trials_have_no_contour_chart() -> None:
    feasible = [trial for trial in samples.invented_trials() if trial.feasible]
    assert charts(states(feasible[:2])["front"]) == ["SCATTER", "SCATTER"]
    assert charts(states(feasible[:3])["front"]) == ["CONTOUR", "SCATTER", "SCATTER"]


def test_parameters_with_one_value_are_left_out() -> None:
    trials = [replace(trial, params={**trial.params, "lora": True}) for trial in TRIALS]
    shown = states(trials)["parameters"]["compareRunCharts"][0]["selectedParams"]
    assert shown == ["step.prune.ratio", "step.quantize.bits"]
    assert "parameters" not in states(trials[:1])


@pytest.mark.parametrize(("count", "kinds"), [(1, ["BAR"]), (2, ["SCATTER"])])
def test_fewer_objectives_have_simpler_charts(count: int, kinds: list[str]) -> None:
    assert charts(states(objectives=samples.OBJECTIVES[:count])["front"]) == kinds


def test_view_links_are_stable(recorder: MlflowRecorder, study: str) -> None:
    assert recorder.study_links(study).view_urls == {}
    snapshot = samples.snapshot(TRIALS, study=study)
    recorder.close_study(snapshot, status="FINISHED")
    first = recorder.study_links(study).view_urls
    assert list(first) == ["front", "parameters", "limits"]
    recorder.close_study(snapshot, status="FINISHED")
    assert recorder.study_links(study).view_urls == first


@browser.needed
def test_browser_shows_charts_of_a_view(mlflow_server: str, tmp_path: Path) -> None:
    recorder = MlflowRecorder(tracking_uri=mlflow_server, experiment="views")
    recorder.connect()
    recorder.open_study("demo", {}, {})
    trials = []
    for number, figures in enumerate(({"decode_ms": 0.5, "ratio": 1.1}, {"decode_ms": 0.7, "ratio": 1.02})):
        result = samples.result(**figures)
        run_id = recorder.record("demo", number, {"bits": 4 * number}, {}, result)
        trials.append(samples.trial(number, result, run_id, 1))
    recorder.close_study(samples.snapshot(trials, study="demo"), status="FINISHED")
    urls = recorder.study_links("demo").view_urls
    page = page_text(urls["front"], tmp_path)
    assert "demo: Pareto front" in page
    assert "2 matching runs" in page
    assert page.index("quality/perplexity_ratio vs. latency/decode_p50_ms") < page.index(
        "latency/decode_p50_ms vs. memory/peak_rss_mib"
    )
    assert "excess/memory/peak_rss_mib" in page_text(urls["limits"], tmp_path)


def page_text(url: str, profile: Path) -> str:
    """Return the text of a page after it was rendered."""
    return " ".join(re.sub("<[^>]+>", " ", browser.dom(url, profile)).split())
