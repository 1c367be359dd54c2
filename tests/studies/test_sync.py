"""Run sweeps while their MLflow server is killed and restarted."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from support.mlflow_server import MlflowServer
from support.sweeping import STUDY, ended, open_storage, require_whole, runs, start

from edgeopt.core import mlflow_tags as tags
from edgeopt.search.storage.trial import ENDED_STATES
from edgeopt.search.storage.trial_storage import list_studies

RATIOS = ", ".join(f"{share / 100:.2f}" for share in range(5, 95, 5))


@pytest.fixture
def server(folder: Path) -> Iterator[MlflowServer]:
    """Yield an MLflow server with the same store that a sweep without a server uses in this folder."""
    started = MlflowServer(folder)
    try:
        yield started
    finally:
        started.kill()


def count_ended(folder: Path) -> int:
    """Return the number of ended trials."""
    storage = open_storage(folder)
    if not (folder / ".edgeopt" / "studies.db").is_file() or STUDY not in list_studies(storage.url):
        return 0
    return sum(trial.state in ENDED_STATES for trial in storage.trials_since(0))


def wait_for_trials(folder: Path, trials: int, sweep: subprocess.Popen[str]) -> None:
    """Wait until at least `trials` trials have ended, the sweep exits, or two minutes have passed."""
    deadline = time.monotonic() + 120
    while count_ended(folder) < trials and sweep.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)


def study_run(folder: Path) -> tuple[str, str]:
    """Return id and status of the study's run."""
    (run,) = [run for run in runs(folder) if run.data.tags.get(tags.ROLE) == "study"]
    return run.info.run_id, run.info.status


def test_sweep_continues_while_server_is_down(folder: Path, server: MlflowServer) -> None:
    sweep = start(folder, "sweep", "--config-name", "tiny_sweep", tracking_uri=server.uri)
    wait_for_trials(folder, 1, sweep)
    server.kill()
    wait_for_trials(folder, 3, sweep)
    assert count_ended(folder) >= 3, "trials end while the server is down"
    server.start()
    code, document, err = ended(sweep)
    assert code == 0, err
    assert "MLflow does not answer" in err
    assert "MLflow answers again" in err
    assert document["champion"]["name"] == "tiny"
    require_whole(folder, open_storage(folder))
    parent, status = study_run(folder)
    assert status == "FINISHED"
    history = MlflowClient(tracking_uri=server.uri).get_metric_history(parent, "trials/finished")
    assert [(m.step, m.value) for m in history] == [(n, float(n)) for n in range(1, 6)]


def test_sync_sends_unrecorded_trials(folder: Path, server: MlflowServer) -> None:
    arguments = ("sweep", "--config-name", "tiny_sweep", "tracking.patience_s=0", "search.trials=3")
    sweep = start(folder, *arguments, tracking_uri=server.uri)
    wait_for_trials(folder, 1, sweep)
    server.kill()
    code, _, err = ended(sweep)
    assert code == 1
    assert "trials are stored locally and not in MLflow yet" in err.splitlines()[-1]
    assert "edgeopt sync toy" in err.splitlines()[-1]
    assert count_ended(folder) == 3
    code, status, err = ended(start(folder, "status"))
    assert (code, status["trials"]) == (0, {"finished": 3}), err
    assert status["unrecorded"] >= 1

    code, _, err = ended(start(folder, "sync"))
    assert code == 1
    assert "MLflow does not answer" in err

    server.start()
    code, synced, err = ended(start(folder, "sync"))
    assert code == 0, err
    assert len(synced["sent"]) == status["unrecorded"]
    assert (synced["left"], synced["evicted"]) == ([], [])
    require_whole(folder, open_storage(folder))
    parent, run_status = study_run(folder)
    assert run_status == "FINISHED"
    artifacts = [file.path for file in MlflowClient(tracking_uri=server.uri).list_artifacts(parent, "front")]
    assert "front/front.html" in artifacts
    assert ended(start(folder, "sync"))[1]["sent"] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_server_has_every_trial_once(folder: Path, server: MlflowServer, workers: int) -> None:
    file = folder / "tiny_sweep.yaml"
    file.write_text(file.read_text().replace("choices: [0.25, 0.5]", f"choices: [{RATIOS}]"))
    rng, kills = random.Random(5), 0
    arguments = ("sweep", "--config-name", "tiny_sweep", "search.trials=20", f"workers={workers}")
    sweep = start(folder, *arguments, tracking_uri=server.uri)
    wait_for_trials(folder, 1, sweep)
    while sweep.poll() is None and (kills < 2 or count_ended(folder) < 18):
        server.kill()
        kills += 1
        time.sleep(rng.uniform(0, 3))
        server.start()  # takes seconds; on a fast machine all trials may end meanwhile
        if kills >= 2:
            time.sleep(rng.uniform(0, 3))
    code, document, err = ended(sweep)
    assert code == 0, err
    assert kills >= 2
    assert len(document["trials"]) == 20
    require_whole(folder, open_storage(folder))
    assert study_run(folder)[1] == "FINISHED"
