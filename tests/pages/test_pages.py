"""Test the pages as browsers and screen readers receive them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import requests
from mlflow import MlflowClient
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient
from support import browser, samples

from edgeopt.core.result import TrialResult
from edgeopt.pages import comparison
from edgeopt.pages.app import PREFIX, create_pages
from edgeopt.pages.sources import Table, Trial
from edgeopt.release.promote import Promotion
from pages.conftest import ServedStudy


class Outline(HTMLParser):
    """Collect what assistive technology uses: landmarks, headings and names of controls."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.unnamed: list[str] = []
        self.labelled = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        attributes = dict(attrs)
        self.labelled += tag == "label"
        if tag in ("input", "select") and not (attributes.get("aria-label") or self.labelled):
            self.unnamed.append(tag)
        if tag == "th" and "scope" not in attributes:
            self.unnamed.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.labelled -= tag == "label"


def test_home_lists_studies_and_releases(served: ServedStudy) -> None:
    page = served.get("/")
    assert page.status_code == 200
    assert f'href="/edgeopt/studies/{served.study_run}">night</a>' in page.text
    assert "<td>running</td>" in page.text
    assert "No model has been released yet" in page.text
    assert "data-live" in page.text


def test_study_page_shows_front_limits_and_trials(served: ServedStudy) -> None:
    text = served.get(f"/studies/{served.study_run}").text
    assert "3 of 4 trials are finished, 2 satisfy every limit, 2 are on the" in " ".join(text.split())
    assert text.count("<circle") == 3
    assert "limit 1.15" in text
    assert "infeasible: exceeds latency: decode p50 +44%" in text
    assert "<td>waiting</td>" in text
    assert "It is 0.200 after the last" in text
    for run_id in served.runs.values():
        assert f"runs/{run_id}" in text
        assert f'value="{run_id}"' in text


def test_axes_order_and_filter_are_in_url(served: ServedStudy) -> None:
    page = f"/studies/{served.study_run}"
    swapped = served.get(f"{page}?x=memory/peak_rss_mib&y=latency/decode_p50_ms").text
    assert "latency: decode p50 (ms) against memory: peak RSS (MiB)" in swapped
    order = [
        re.findall(r'aria-label="select trial (\d)"', served.get(f"{page}?{q}").text)
        for q in (
            "sort=latency/decode_p50_ms",
            "sort=latency/decode_p50_ms&down=on",
            "sort=number&down=on",
            "feasible=on",
        )
    ]
    assert order == [["0", "1", "2"], ["2", "1", "0"], ["2", "1", "0"], ["0", "1"]]
    sorted_page = served.get(f"{page}?sort=latency/decode_p50_ms").text
    assert 'aria-sort="ascending"' in sorted_page


def test_compare_page_shows_differences(served: ServedStudy) -> None:
    chosen = "&".join(f"run={run_id}" for run_id in list(served.runs.values())[:2])
    text = " ".join(served.get(f"/compare?{chosen}").text.split())
    assert '<th scope="row">bits</th><td>4</td><td>5</td>' in text
    assert '<th scope="row">name</th>' not in text, "equal values are not shown"
    assert "0.6 ms" in text
    assert "0.9 ms (1.50×)" in text
    assert 'class="significant"' in text
    assert "fp32" in text
    assert '<td class="text">x):</td>' in text
    assert '<td class="text">n):</td>' in text


def test_release_page_shows_versions_ledger_and_gates(served: ServedStudy, released: Promotion) -> None:
    assert 'href="/edgeopt/releases/small%20models"' in served.get("/").text
    page = served.get("/releases/small%20models")
    text = " ".join(page.text.split())
    assert page.status_code == 200
    assert "2 versions. <b>champion</b> is version" in text
    assert "they are &lt;good&gt;" in text
    assert "Verdicts of the gates" in text
    assert '<abbr title="Time per generated token' in text or "<abbr title='Time per generated token" in text
    assert '<td class="n">0.6 ms</td>' in text, "the objectives of the promoted trials"
    assert f'href="/edgeopt/studies/{served.study_run}">Study night</a>' in text
    assert "UTC</time>" in text
    for gate in {verdict.gate for verdict in released.releases[0].gates}:
        assert f'<td>{gate}</td><td class="passed">passed</td>' in text


def test_settings_show_plain_class_names() -> None:
    trials = [
        comparison_trial({"step.0._target_": f"edgeopt.compress.quantization.{name}"})
        for name in ("gptq.Gptq", "rtn.Rtn")
    ]
    assert comparison.different_settings(trials) == [("step.0", ["Gptq", "Rtn"])]


def test_metrics_show_the_original_model() -> None:
    results = [replace(samples.result(decode_ms=v), baseline=samples.BASELINE) for v in (0.6, 0.9)]
    rows = {row.metric: row for row in comparison.metric_rows([comparison_trial({}, result) for result in results])}
    assert rows["latency/decode_p50_ms"].original == "1.3 ms"
    assert rows["size/engine_mib"].original == ""
    assert rows["latency/decode_p50_ms"].cells[1].is_significant


def comparison_trial(params: dict[str, str], result: TrialResult | None = None) -> Trial:
    """Return a trial with these params in its run."""
    run = SimpleNamespace(data=SimpleNamespace(params=params))
    return Trial(run=run, result=result or samples.result(), layers=Table(), generations=Table())


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/studies/" + "0" * 32, 404, "does not exist"),
        ("/studies/..%2f..", 404, ""),
        ("/studies/x", 404, "must have 32 hexadecimal digits"),
        ("/compare?run=" + "0" * 32, 404, "2 to 4 trials, got 1"),
        ("/releases/nobody", 404, "no model &#39;nobody&#39; is registered"),
    ],
)
def test_missing_objects_are_reported_with_hint(served: ServedStudy, path: str, status: int, message: str) -> None:
    page = served.get(path)
    assert page.status_code == status
    assert message in page.text


def test_trial_run_is_not_a_study(served: ServedStudy) -> None:
    page = served.get(f"/studies/{served.runs[0]}")
    assert page.status_code == 404
    assert "must be a study" in page.text


def test_logged_text_is_escaped_on_pages(served: ServedStudy) -> None:
    for path in (f"/studies/{served.study_run}", "/compare?" + "&".join(f"run={r}" for r in served.runs.values())):
        page = served.get(path)
        assert "<b>bold" not in page.text
        assert "recipe <" not in page.text
        assert "default-src 'self'" in page.headers["Content-Security-Policy"]
        assert "style=" not in page.text, "the content security policy forbids inline styles"
        assert "<script>" not in page.text


def test_pages_have_landmarks_and_named_controls(served: ServedStudy) -> None:
    chosen = "&".join(f"run={run_id}" for run_id in served.runs.values())
    for path in ("/", f"/studies/{served.study_run}", f"/compare?{chosen}"):
        outline = Outline(served.get(path).text)
        assert {"header", "nav", "main", "h1"} <= set(outline.tags)
        assert outline.tags.count("main") == 1
        assert outline.unnamed == []


def test_mlflow_pages_and_api_still_work(served: ServedStudy) -> None:
    assert requests.get(served.uri, timeout=30).status_code == 200
    assert MlflowClient(tracking_uri=served.uri).get_run(served.study_run).info.status == "RUNNING"


def test_pages_serve_a_remote_mlflow_server(served: ServedStudy) -> None:
    app = Starlette(routes=[Mount(PREFIX, app=create_pages(served.uri, "https://mlflow.example/"))])
    text = TestClient(app).get(f"{PREFIX}/studies/{served.study_run}").text
    assert 'href="https://mlflow.example/#/experiments/' in text
    assert "href='https://mlflow.example/#/experiments/" in text, "the points of the chart link to the same server"
    assert text.count("<circle") == 3


def test_unreachable_server_is_reported() -> None:
    app = Starlette(routes=[Mount(PREFIX, app=create_pages("http://127.0.0.1:9", "http://127.0.0.1:9/"))])
    page = TestClient(app).get(f"{PREFIX}/")
    assert page.status_code == 502
    assert "MLflow does not answer" in page.text


@browser.needed
def test_live_page_refreshes_in_browser(served: ServedStudy, tmp_path: Path) -> None:
    """Within the budget of virtual time the page refreshes several times."""
    text = browser.dom(f"{served.uri}/edgeopt/studies/{served.study_run}", tmp_path, budget_s=10)
    assert text.count("<circle") == 3
    assert 'aria-label="select trial 2"' in text


@pytest.mark.timeout(180)
def test_ui_command_serves_until_interrupted(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "edgeopt.cli", "ui", "--port", str(port)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:
        page = None
        for _ in range(300):
            with contextlib.suppress(requests.RequestException):
                page = requests.get(f"http://127.0.0.1:{port}/edgeopt/", timeout=5)
                break
            time.sleep(0.2)
        assert page is not None, (tmp_path / "log").read_text()
        assert "No study has been recorded yet" in page.text
        assert f"http://127.0.0.1:{port}/edgeopt/" in (tmp_path / "log").read_text()
        (served,) = psutil.Process(process.pid).children(recursive=True)
        assert "uvicorn" in served.cmdline(), "no job runners of MLflow are started"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert (tmp_path / "mlflow.db").is_file()


def test_ui_command_reports_unreachable_server(capsys: pytest.CaptureFixture[str]) -> None:
    from edgeopt.cli.main import main

    assert main(["ui", "--tracking-uri", "http://127.0.0.1:9"]) == 1
    assert "MLflow does not answer" in capsys.readouterr().err
