"""Run several workers on one study: processes, roles, other working folders, other versions, Ray."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from benchmarks.common import worker_processes
from support import trial_storages
from support.postgresql import Postgres
from support.sweeping import STUDY, ended, open_storage, require_whole, runs, start, sweep

from edgeopt.core import mlflow_tags as tags
from edgeopt.search.storage.trial import ENDED_STATES
from edgeopt.search.storage.trial_storage import TrialStorage
from edgeopt.search.storage.worker_record import WorkerRecord


def test_two_workers_share_a_sweep(folder: Path) -> None:
    code, document, err = sweep(folder, "workers=2")
    assert code == 0, err
    assert document["front"]
    assert document["champion"]["name"] == "tiny"
    require_whole(folder, open_storage(folder))
    trials = open_storage(folder).trials_since(0)
    assert len({trial.worker for trial in trials}) == 2
    assert len({json.dumps(trial.params, sort_keys=True) for trial in trials}) == len(trials)
    (parent,) = [run for run in runs(folder) if run.data.tags.get(tags.ROLE) == "study"]
    assert parent.data.metrics["trials/finished"] == len(trials) == 5
    assert 0 < parent.data.metrics["progress/hypervolume"] <= 1
    code, status, err = ended(start(folder, "status"))
    assert code == 0, err
    assert status["stop_reason"] == "budget of 5 trials reached"
    assert status["trials"] == {"finished": 5}
    assert status["workers"] == []
    assert len(status["hypervolumes"]) == 5


def test_worker_roles_run_from_any_folder(folder: Path, tmp_path: Path) -> None:
    code, _, err = sweep(folder, "search.trials=1", "promote=null")
    assert code == 0, err
    storage = open_storage(folder)
    for ratio in (0.25, 0.5):
        storage.add({"recipe": "prune_int4", "step.prune.ratio": ratio}, origin="enqueued")
    _set_budget(folder, trials=3)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    state = ["--state", str(folder / ".edgeopt")]
    builder = start(folder, "worker", STUDY, *state, "--role", "build", cwd=elsewhere)
    deadline = time.monotonic() + 120
    while sum(trial.built for trial in storage.trials_since(0)) < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    built = [trial for trial in storage.trials_since(0) if trial.built]
    assert [trial.state for trial in built] == ["waiting"] * 2, "built trials wait for a worker that measures"
    code, document, err = ended(start(folder, "worker", STUDY, *state, "--role", "measure", cwd=elsewhere))
    assert code == 0, err
    assert document["trials"] == [trial.number for trial in built]
    assert ended(builder)[0] == 0
    require_whole(folder, storage)
    for trial in built:
        timings = storage.load_result(trial.number)["timings_s"]
        assert any(stage.startswith("measure/") for stage in timings)


def _set_budget(folder: Path, *, trials: int) -> None:
    """Change the stored budget, as a sweep of the same study with another number of trials does."""
    import sqlite3

    with sqlite3.connect(folder / ".edgeopt" / "studies.db") as store:
        (text,) = store.execute("select sweep from edgeopt_studies").fetchone()
        saved: dict[str, Any] = json.loads(text)
        saved["config"]["search"]["trials"] = trials
        store.execute("update edgeopt_studies set sweep = ?", (json.dumps(saved),))


def test_worker_of_another_version_is_refused(folder: Path) -> None:
    assert sweep(folder, "search.trials=1", "promote=null")[0] == 0
    other = WorkerRecord(worker="other", host="elsewhere", process="1:1", role="all", code="0.0.1+abc", beat=0)
    open_storage(folder).register_worker(other)
    _set_budget(folder, trials=2)
    code, _, err = ended(start(folder, "worker", STUDY))
    assert code == 2
    assert "worker other runs 0.0.1+abc" in err
    assert len(open_storage(folder).trials_since(0)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["workers=0"], "`workers` must be a positive integer, got 0"),
        (["store=postgresql://me:secret@db/studies"], "`store` must not contain a password"),
        (["store=mysql://db/studies"], "must be a SQLite or PostgreSQL URL, got mysql"),
        (["search.stagnation=0"], "`stagnation` must be at least 1, got 0"),
        (["search.time=soon"], "must be a quantity, got 'soon'"),
        (["search.energy='0 J'"], "`energy` must be above 0"),
        (["search.sampler=guess"], "guess"),
    ],
)
def test_invalid_sweep_starts_no_work(folder: Path, arguments: list[str], message: str) -> None:
    code, document, err = sweep(folder, *arguments)
    assert (code, document) == (2, {}), err
    assert message in err
    assert "secret" not in err
    assert len(err.strip().splitlines()) == 1
    assert not (folder / "mlflow.db").exists()


def test_unknown_study_error_lists_existing_studies(folder: Path) -> None:
    trial_storages.open_study(open_storage(folder).url, STUDY)
    for command in ("worker", "status", "front"):
        code, _, err = ended(start(folder, command, "other"))
        assert code == 2
        assert "there is no study 'other'" in err
        assert "Choose one of: toy" in err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_study_survives_killed_workers_and_database(folder: Path, postgresql: Postgres) -> None:
    store, rng = postgresql.database(), random.Random(3)
    process = start(folder, "sweep", "--config-name", "tiny_sweep", "workers=3", "promote=null", store=store)
    storage, known, kills = TrialStorage(store, STUDY), {}, 0
    while process.poll() is None:
        time.sleep(rng.uniform(2, 6))
        if kills == 4:
            postgresql.restart()
        workers = worker_processes(process.pid)
        if kills < 8 and workers:
            rng.choice(workers).send_signal(signal.SIGKILL)
            kills += 1
        try:
            current = {trial.number: trial.summary for trial in storage.trials_since(0) if trial.state in ENDED_STATES}
        except Exception:  # the database restarts, or the study is not created yet
            continue
        assert known.items() <= current.items(), "an ended trial was lost or changed"
        known = current
    assert ended(process)[0] == 0
    assert len(known) <= len([trial for trial in storage.trials_since(0) if trial.state in ENDED_STATES]) == 5
    require_whole(folder, storage)


CLUSTER = """
import os, subprocess, sys, time
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
builder = cluster.add_node(num_cpus=1)
cluster.add_node(num_cpus=1, resources={"edgeopt:this_machine": 1})
sweep = subprocess.Popen(sys.argv[1:], env={**os.environ, "RAY_ADDRESS": cluster.address})
time.sleep(30)
cluster.remove_node(builder, allow_graceful=False)
code = sweep.wait(timeout=500)
cluster.shutdown()
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ray_study_survives_loss_of_a_node(folder: Path) -> None:
    pytest.importorskip("ray", reason="pip install 'edgeopt[ray]'")
    command = [sys.executable, "-m", "edgeopt.cli", "sweep", "--config-name", "tiny_sweep", "--config-dir", str(folder)]
    command += ["search.engine=ray", "workers=2", "search.lease_s=10", "promote=null", "--json"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    require_whole(folder, open_storage(folder))
    trials = open_storage(folder).trials_since(0)
    assert [trial.state for trial in trials] == ["finished"] * 5
    assert all(trial.built for trial in trials)
