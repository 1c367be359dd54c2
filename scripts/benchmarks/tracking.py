"""Benchmark logging to MLflow and the display of large studies."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import requests
from mlflow import MlflowClient
from support.mlflow_server import MlflowServer

from benchmarks.common import cli, print_time
from benchmarks.release import create_promoted_model
from benchmarks.search import add_finished_trials, create_study
from edgeopt.core.result import Measurement, TrialResult
from edgeopt.tracking.recorder import MlflowRecorder

TRIALS, PROMOTIONS = 5_000, 50


def logging(folder: Path) -> None:
    """Time to log a trial of 60 params, 120 metrics, 2,000 samples and 1 MiB of artifacts, without an engine."""
    result = _trial(folder)
    params = {f"step.setting_{number}": number for number in range(60)}
    server = MlflowServer(folder)
    try:
        for name, uri in (("local store", f"sqlite:///{folder / 'local.db'}"), ("local server", server.uri)):
            recorder = MlflowRecorder(tracking_uri=uri)
            recorder.connect()
            recorder.open_study("bench", {}, {})
            seconds = []
            for number in range(12):
                start = time.perf_counter()
                run_id = recorder.begin("bench", number, params, {})
                recorder.record("bench", number, params, {}, result, run_id=run_id)
                seconds.append(time.perf_counter() - start)
            print(
                f"{name}: {statistics.median(seconds[2:]):.2f} s per trial, at most {max(seconds[2:]):.2f} s",
                flush=True,
            )
    finally:
        server.kill()
    print()


def _trial(folder: Path) -> TrialResult:
    """Return a trial result with many metrics, samples and artifacts."""
    tables = folder / "tables"
    tables.mkdir()
    rows = [["latency", 0, "", "decode_s", number, 0.001 * number] for number in range(2000)]
    columns = ["probe", "process", "disturbance", "figure", "number", "value"]
    (tables / "samples.json").write_text(json.dumps({"columns": columns, "data": rows}))
    (folder / "notes.bin").write_bytes(bytes(2**20))
    measurements = tuple(
        Measurement(metric=f"bench/metric_{n}", unit="", value=n, low=n, high=n, count=1, method="none")
        for n in range(120)
    )
    return TrialResult(
        recipe={"text": "none", "digest": ""},
        target="none",
        device={"name": "bench"},
        emulated=False,
        measurements=measurements,
        artifacts={"tables": str(tables), "notes.bin": str(folder / "notes.bin")},
    )


def five_thousand(folder: Path) -> None:
    """Time of a study page, `edgeopt front` and `edgeopt audit`: 5,000 trials, 5,000 other runs, 50 promotions."""
    server = MlflowServer(folder, "--app-name", "edgeopt")
    try:
        opened = create_study(folder, None, tracking_uri=server.uri, trials=TRIALS)
        add_finished_trials(opened, TRIALS)
        opened.log().publish()
        run_id = opened.recorder.open_study(opened.name, {}, {})
        address = f"{server.uri}/edgeopt/studies/{run_id}"
        print_time("page of the study", lambda: requests.get(address, timeout=60).raise_for_status())
        client = MlflowClient(tracking_uri=server.uri)
        experiment = client.create_experiment("runs")
        for _ in range(TRIALS):
            client.create_run(experiment)
        create_promoted_model(client, "edgeopt", PROMOTIONS)
        opened.study.storage.update_sweep_info(promoted="edgeopt")
        print_time("edgeopt front", lambda: cli(folder, "front", opened.name, "--state", str(folder)))
        print_time("edgeopt audit", lambda: cli(folder, "audit", "edgeopt", "--tracking-uri", server.uri))
    finally:
        server.kill()
    print()
