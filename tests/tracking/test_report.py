"""Test the report on a study as text and in a browser."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from support import browser, samples

from edgeopt.core.study_snapshot import TrialSnapshot
from edgeopt.tracking import report
from edgeopt.tracking.report import SearchStatistics

TRIALS = samples.invented_trials()
COURSE = SearchStatistics(
    hypervolumes=(0.0, 0.1, 0.1, 0.25),
    importance={"latency/decode_p50_ms": {"bits": 0.8, "ratio": 0.15, "seed": 0.001}},
    spent_s=600.0,
    spent_j=7200.0,
    saved_s={"prediction": 90.0, "cache": 0.0},
)


def page(
    folder: Path, statistics: SearchStatistics = COURSE, trials: Sequence[TrialSnapshot] = TRIALS, **changed: Any
) -> str:
    report.write(folder / "report.html", samples.snapshot(trials, **changed), statistics=statistics)
    return (folder / "report.html").read_text()


def section(text: str, title: str) -> str:
    """Return the text of a section, one line per table row."""
    found = text.split(f"<h2>{title}</h2>")[1].split("<h2>")[0]
    rows = re.sub("<[^>]+>", " ", found.replace("</tr>", "\n")).splitlines()
    return "\n".join(unescape(" ".join(row.split())) for row in rows)


def test_each_pair_of_objectives_has_a_chart(tmp_path: Path) -> None:
    text = page(tmp_path)
    assert text.count("class='chart'") == 3
    assert text.count("class='chart' hidden") == 2
    assert re.findall("<option>([^<]*)</option>", text) == [
        "quality: perplexity ratio against latency: decode p50 (ms)",
        "quality: perplexity ratio against memory: peak RSS (MiB)",
        "latency: decode p50 (ms) against memory: peak RSS (MiB)",
    ]
    assert "<option>" not in page(tmp_path, objectives=samples.OBJECTIVES[:2])


def test_limit_table_counts_trials_and_headroom(tmp_path: Path) -> None:
    text = section(page(tmp_path), "Limits")
    rss = "memory/peak_rss_mib"
    judged = [excess for trial in TRIALS if (excess := trial.excess[rss]) is not None]
    front = [-excess for trial in TRIALS if trial.on_front and (excess := trial.excess[rss]) is not None]
    satisfied = sum(1 for excess in judged if excess <= 0)
    assert f"at most 90 MiB 90 MiB – {satisfied} of {len(judged)} {min(front):.0%} to {max(front):.0%}" in text


def test_limit_table_shows_original_model(tmp_path: Path) -> None:
    trials = [replace(trial, baseline=samples.BASELINE) for trial in TRIALS]
    assert "at most 0.8 x baseline 1.04 ms 1.3 ms" in section(page(tmp_path, trials=trials), "Limits")
    assert "original model 1 1.3 ms 100 MiB" in section(page(tmp_path, trials=trials), "All trials")


def test_unmeasured_limit_is_not_called_satisfied(tmp_path: Path) -> None:
    trials = [replace(trial, excess=dict.fromkeys(trial.excess)) for trial in TRIALS[:8]]
    text = section(page(tmp_path, trials=trials), "Limits")
    assert text.count("not measured") == 3
    assert "of 8" not in text


def test_outcomes_are_counted_with_causes(tmp_path: Path) -> None:
    infeasible = {"feasible": False, "pareto_rank": None}
    excess = {limit.metric: 0.5 for limit in samples.LIMITS}
    refused = replace(TRIALS[0], state="refused", rung="prediction", excess=excess, **infeasible)
    stopped = replace(
        TRIALS[1], state="stopped", rung="quality", excess={"quality/perplexity_ratio": 0.1}, **infeasible
    )
    text = section(page(tmp_path, trials=[refused, stopped, TRIALS[-1]], statistics=SearchStatistics()), "Outcomes")
    assert "refused by prediction 1 quality: perplexity ratio (1), latency" in text
    assert "stopped early at quality 1 quality: perplexity ratio (1)" in text
    assert "failed 1 at build (1)" in text


def test_refused_trial_shows_predicted_value_and_limit(tmp_path: Path) -> None:
    rss = "memory/peak_rss_mib"
    refused = replace(
        TRIALS[0],
        state="refused",
        rung="prediction",
        feasible=False,
        pareto_rank=None,
        metrics={},
        predicted={rss: 120.0},
        excess={rss: 1 / 3},
    )
    text = section(page(tmp_path, trials=[refused, *TRIALS[1:]]), "All trials")
    assert "refused by prediction: memory: peak RSS 120 MiB predicted, limit 90 MiB (+33%)" in text
    assert "120 MiB predicted –" in text


def test_headers_explain_metrics(tmp_path: Path) -> None:
    text = page(tmp_path)
    assert "<abbr title='Time per generated token, 50th percentile.'>latency: decode p50</abbr>" in text
    assert "title='Highest resident memory (RSS)" in text


def test_important_parameters_are_listed(tmp_path: Path) -> None:
    text = section(page(tmp_path), "Parameter importance")
    assert "bits 80%" in text
    assert "seed" not in text
    assert "no parameter decides" in section(page(tmp_path, statistics=SearchStatistics()), "Parameter importance")


def test_progress_shows_time_energy_and_hypervolume(tmp_path: Path) -> None:
    text = section(page(tmp_path), "Progress of the search")
    assert "took 10.0 minutes. They needed 2 Wh. Time saved: 1.5 min by prediction." in text
    assert "It is 0.250 after the last of 4 evaluated trials" in text
    assert "evaluated trials</text>" in page(tmp_path)
    assert "hypervolume</text>" in page(tmp_path)
    assert "polyline" not in section(page(tmp_path, statistics=SearchStatistics()), "Progress of the search")


def test_summary_recommends_a_trial(tmp_path: Path) -> None:
    trials = [replace(trial, baseline=samples.BASELINE) for trial in TRIALS]
    text = page(tmp_path, trials=trials)
    assert re.search(r"<p class=\"summary\">Recommended: trial \d+ \(", text)
    assert "Compared with the original model it " in text


def test_failed_trials_without_limits_are_shown(tmp_path: Path) -> None:
    assert "No limits were set." in page(tmp_path, trials=TRIALS[-1:], limits=[], statistics=SearchStatistics())


USE = """
<script type="module">
const rows = () => [...document.querySelector("table.trials").tBodies[0].rows];
const column = (n) => rows().filter((r) => !r.hidden).map((r) => r.cells[n].textContent).join(",");
const head = (n) => document.querySelector("table.trials").tHead.rows[0].cells[n];
const out = [];
head(3).querySelector("button").click(); out.push(head(3).getAttribute("aria-sort") + ":" + column(3));
head(3).querySelector("button").click(); out.push(head(3).getAttribute("aria-sort") + ":" + column(3));
document.getElementById("feasible").click(); out.push(column(1));
const words = document.getElementById("words"); words.value = "bits=4 FRONT"; words.dispatchEvent(new Event("input"));
out.push(column(6));
const pair = document.getElementById("pair"); pair.selectedIndex = 2; pair.dispatchEvent(new Event("change"));
out.push([...document.querySelectorAll(".chart")].map((c) => c.hidden).join(","));
document.body.textContent = "RESULT" + out.join("|") + "END";
</script>
"""


@browser.needed
def test_browser_sorts_filters_and_switches_charts(tmp_path: Path) -> None:
    (tmp_path / "used.html").write_text(page(tmp_path).replace("</body>", USE + "</body>"))
    shown = browser.dom((tmp_path / "used.html").as_uri(), tmp_path, budget_s=20)
    ascending, descending, feasible, filtered, charts = unescape(shown.split("RESULT")[1].split("END")[0]).split("|")
    figures = sorted(trial.metrics["latency/decode_p50_ms"] for trial in TRIALS if trial.metrics)
    read = [float(cell.split()[0]) for cell in ascending.removeprefix("ascending:").split(",") if cell != "–"]
    assert read == pytest.approx(figures, abs=0.01)
    assert ascending.endswith("–"), "unmeasured values are last"
    rows = ascending.removeprefix("ascending:").split(",")[:-1]
    assert descending.removeprefix("descending:").split(",")[:-1] == rows[::-1]
    assert set(feasible.split(",")) == {"on the front", "feasible"}
    assert filtered
    assert all("bits=4" in cell for cell in re.split(r",(?=step)", filtered))
    assert charts == "true,true,false"


def test_disturbed_trial_does_not_satisfy_its_limit() -> None:
    calm = samples.trial(0, samples.result(), None, 1)
    disturbed = replace(calm, number=1, feasible=False, pareto_rank=None, disturbed=("latency/decode_p50_ms",))
    snapshot = samples.snapshot([calm, disturbed])
    assert ">1 of 2<" in report.limit_table(snapshot)
    assert "disturbed (1)" in report.outcome_table(snapshot.trials)
    assert report.describe_outcome(snapshot, disturbed) == (
        "infeasible: disturbed by other processes: latency: decode p50"
    )
