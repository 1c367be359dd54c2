from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import requests
from support import samples
from support.mlflow_server import MlflowServer

from edgeopt.core.study_snapshot import TrialSnapshot
from edgeopt.release import policy
from edgeopt.release.promote import Promotion, promote
from edgeopt.tracking.recorder import MlflowRecorder

CRITERION = {"metric": "latency/decode_p50_ms", "direction": "minimize", "weight": 1.0}


@dataclass(frozen=True, kw_only=True)
class ServedStudy:
    """A server with the pages and a running study."""

    uri: str
    recorder: MlflowRecorder
    study_run: str
    runs: dict[int, str]
    trials: list[TrialSnapshot]

    def get(self, path: str) -> requests.Response:
        return requests.get(f"{self.uri}/edgeopt{path}", timeout=30)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedStudy]:
    folder = tmp_path_factory.mktemp("pages")
    server = MlflowServer(folder, "--app-name", "edgeopt")
    try:
        yield fill_store(server.uri, folder)
    finally:
        server.kill()


@pytest.fixture(scope="module")
def released(served: ServedStudy) -> Promotion:
    """Promote the front of that study."""
    data = {"model": "small models", "aliases": {"champion": [CRITERION]}}
    return promote(
        samples.snapshot(served.trials, study="night"),
        policy=policy.parse(data, name="test", location="test"),
        tracking_uri=served.uri,
        reason="they are <good>",
    )


def fill_store(uri: str, folder: Path) -> ServedStudy:
    """Record a running study with three finished trials, two of them on the front, and one waiting trial."""
    recorder = MlflowRecorder(tracking_uri=uri)
    study_run = recorder.open_study("night", {}, {})
    outcomes = {
        0: samples.result(samples.engine(folder / "a", seed=1), decode_ms=0.6, ratio=1.10),
        1: samples.result(samples.engine(folder / "b", seed=2), decode_ms=0.9, ratio=1.02),
        2: samples.result(samples.engine(folder / "c", seed=3), decode_ms=1.5, ratio=1.01),
    }
    texts = [{"prompt": "def f(", "continuation": "x):", "baseline": "n):"}]
    runs, trials = {}, []
    for number, outcome in outcomes.items():
        tables = folder / f"tables-{number}"
        tables.mkdir()
        generations = {"columns": list(texts[0]), "data": [[*texts[0].values()]]}
        (tables / "generations.json").write_text(json.dumps(generations))
        result = replace(
            outcome, artifacts={"tables": str(tables)}, recipe={"text": f"recipe <{number}>", "digest": "d"}
        )
        params = {"bits": 4 + number, "name": "<b>bold</b>"}
        runs[number] = recorder.record("night", number, params, {}, result)
        trials.append(replace(samples.trial(number, result, runs[number], {0: 1, 1: 1}.get(number)), params=params))
        recorder.progress("night", {"progress/hypervolume": 0.1 * number}, number + 1, 1000.0 + number)
    unevaluated = {"metrics": {}, "excess": {}, "run_id": None, "pareto_rank": None}
    trials.append(replace(trials[0], number=3, state="waiting", feasible=False, **unevaluated))
    recorder.publish(samples.snapshot(trials, study="night"))
    return ServedStudy(uri=uri, recorder=recorder, study_run=study_run, runs=runs, trials=trials)
