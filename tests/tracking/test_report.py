"""The report on a study, as text and in a browser."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from support import browser, samples

from edgeopt.tracking import report
from edgeopt.tracking.report import Course

ROWS = samples.rows()
COURSE = Course(
    hypervolumes=(0.0, 0.1, 0.1, 0.25),
    importance={"latency/decode_p50_ms": {"bits": 0.8, "ratio": 0.15, "seed": 0.001}},
    spent_s=600.0,
    spent_j=7200.0,
    saved_s={"prediction": 90.0, "cache": 0.0},
)


def page(folder: Path, course: Course = COURSE, **changed: Any) -> str:
    shape = {"rows": ROWS, "objectives": samples.OBJECTIVES, "limits": samples.LIMITS} | changed
    report.write(folder / "report.html", study="s", **shape, course=course)
    return (folder / "report.html").read_text()


def section(text: str, title: str) -> str:
    """The words of a section, a line a row of its table."""
    found = text.split(f"<h2>{title}</h2>")[1].split("<h2>")[0]
    rows = re.sub("<[^>]+>", " ", found.replace("</tr>", "\n")).splitlines()
    return "\n".join(unescape(" ".join(row.split())) for row in rows)


def test_each_two_objectives_have_a_chart_of_which_one_is_shown(tmp_path: Path) -> None:
    text = page(tmp_path)
    assert text.count("class='chart'") == 3
    assert text.count("class='chart' hidden") == 2
    assert re.findall("<option>([^<]*)</option>", text) == [
        "quality: perplexity ratio against latency: decode p50 (ms)",
        "quality: perplexity ratio against memory: peak RSS (MiB)",
        "latency: decode p50 (ms) against memory: peak RSS (MiB)",
    ]
    assert "<option>" not in page(tmp_path, objectives=samples.OBJECTIVES[:2])


def test_limits_say_how_many_keep_them_and_what_room_the_front_leaves(tmp_path: Path) -> None:
    told = section(page(tmp_path), "Limits")
    judged = [row["excess"]["memory/peak_rss_mib"] for row in ROWS if row["excess"]["memory/peak_rss_mib"] is not None]
    front = [-row["excess"]["memory/peak_rss_mib"] for row in ROWS if row["pareto_rank"] == 1]
    kept = sum(1 for excess in judged if excess <= 0)
    assert f"at most 90 MiB 90 MiB {kept} of {len(judged)} {min(front):.0%} to {max(front):.0%}" in told


def test_outcomes_are_counted_with_what_was_broken(tmp_path: Path) -> None:
    refused = {**ROWS[0], "state": "refused", "feasible": False, "pareto_rank": None}
    refused["excess"] = {limit["metric"]: 0.5 for limit in samples.LIMITS}
    stopped = {**ROWS[1], "refused": "quality", "feasible": False, "pareto_rank": None}
    stopped["excess"] = {"quality/perplexity_ratio": 0.1}
    told = section(page(tmp_path, rows=[refused, stopped, ROWS[-1]], course=Course()), "How the trials ended")
    assert "refused by prediction, before any work 1 quality: perplexity ratio (1), latency" in told
    assert "stopped after quality 1 quality: perplexity ratio (1)" in told
    assert "failed 1 at build (1)" in told


def test_what_decides_is_listed_and_what_does_not_is_left_out(tmp_path: Path) -> None:
    told = section(page(tmp_path), "What decides")
    assert "bits 80%" in told
    assert "seed" not in told
    assert "no parameter decides" in section(page(tmp_path, course=Course()), "What decides")


def test_the_course_tells_time_energy_and_growth(tmp_path: Path) -> None:
    told = section(page(tmp_path), "How the search went")
    assert "took 10.0 minutes. They needed 2 Wh. Minutes that were not spent: 1.5 by estimate." in told
    assert "0.250 after the last" in told
    assert "<polyline points='0.0,146.0 240.0," in page(tmp_path)
    assert "polyline" not in section(page(tmp_path, course=Course()), "How the search went")


def test_an_objective_that_no_trial_has_and_no_limits_are_no_trouble(tmp_path: Path) -> None:
    told = page(tmp_path, rows=ROWS[-1:], limits=[], course=Course())
    assert "No limits were set." in told


USE = """
<script type="module">
const rows = () => [...document.querySelector("table.trials").tBodies[0].rows];
const column = (n) => rows().filter((r) => !r.hidden).map((r) => r.cells[n].textContent).join(",");
const head = (n) => document.querySelector("table.trials").tHead.rows[0].cells[n];
const out = [];
head(3).querySelector("button").click(); out.push(head(3).getAttribute("aria-sort") + ":" + column(3));
head(3).querySelector("button").click(); out.push(head(3).getAttribute("aria-sort") + ":" + column(3));
document.getElementById("kept").click(); out.push(column(1));
const words = document.getElementById("words"); words.value = "bits=4 FRONT"; words.dispatchEvent(new Event("input"));
out.push(column(6));
const pair = document.getElementById("pair"); pair.selectedIndex = 2; pair.dispatchEvent(new Event("change"));
out.push([...document.querySelectorAll(".chart")].map((c) => c.hidden).join(","));
document.body.textContent = "RESULT" + out.join("|") + "END";
</script>
"""


@browser.needed
def test_in_a_browser_trials_are_sorted_and_filtered_and_another_chart_is_chosen(tmp_path: Path) -> None:
    (tmp_path / "used.html").write_text(page(tmp_path).replace("</body>", USE + "</body>"))
    shown = browser.dom((tmp_path / "used.html").as_uri(), tmp_path, budget_s=20)
    up, down, kept, words, charts = unescape(shown.split("RESULT")[1].split("END")[0]).split("|")
    figures = sorted(row["metrics"]["latency/decode_p50_ms"] for row in ROWS if row["metrics"])
    read = [float(cell.split()[0]) for cell in up.removeprefix("ascending:").split(",") if cell != "–"]
    assert read == pytest.approx(figures, abs=0.01)
    assert up.endswith("–"), "what was not measured is the last"
    assert down.removeprefix("descending:").split(",")[:-1] == up.removeprefix("ascending:").split(",")[:-1][::-1]
    assert set(kept.split(",")) == {"on the front", "keeps every limit"}
    assert words
    assert all("bits=4" in cell for cell in re.split(r",(?=step)", words))
    assert charts == "true,true,false"
