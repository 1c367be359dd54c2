"""Several workers on one study, as people start them: processes, roles, other folders, other versions, Ray."""

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
from benchmarks.common import workers_of
from support import trial_stores
from support.postgresql import Postgres
from support.sweeping import ended, ledger_of, require_whole, runs, start, sweep

from edgeopt.core import mlflow_tags as tags
from edgeopt.search.storage.trial import DONE
from edgeopt.search.storage.trial_store import Ledger, Member


def test_two_workers_share_a_sweep_and_its_course_is_drawn(folder: Path) -> None:
    code, document, err = sweep(folder, "workers=2")
    assert code == 0, err
    assert document["front"]
    assert document["champion"]["name"] == "tiny"
    require_whole(folder, ledger_of(folder))
    rows = ledger_of(folder).changes(0)
    assert len({row.worker for row in rows}) == 2
    assert len({json.dumps(row.params, sort_keys=True) for row in rows}) == len(rows)
    (parent,) = [run for run in runs(folder) if run.data.tags.get(tags.ROLE) == "study"]
    assert parent.data.metrics["trials/finished"] == len(rows) == 5
    assert 0 < parent.data.metrics["progress/hypervolume"] <= 1
    code, told, err = ended(start(folder, "status"))
    assert code == 0, err
    assert told["over"] == "5 trials were evaluated"
    assert told["trials"] == {"finished": 5}
    assert told["workers"] == []
    assert len(told["hypervolumes"]) == 5


def test_builders_build_and_measurers_measure_from_any_working_folder(folder: Path, tmp_path: Path) -> None:
    code, _, err = sweep(folder, "search.trials=1", "promote=null")
    assert code == 0, err
    ledger = ledger_of(folder)
    for bits in (0.25, 0.5):
        ledger.add({"recipe": "prune_int4", "step.prune.ratio": bits}, origin="enqueued")
    sweep_file = folder / "tiny_sweep.yaml"
    sweep_file.write_text(sweep_file.read_text().replace("trials: 5", "trials: 3"))
    _reopen(folder, trials=3)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    state = ["--state", str(folder / ".edgeopt")]
    builder = start(folder, "worker", "kill", *state, "--role", "build", cwd=elsewhere)
    deadline = time.monotonic() + 120
    while sum(row.built for row in ledger.changes(0)) < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    built = [row for row in ledger.changes(0) if row.built]
    assert [row.state for row in built] == ["waiting"] * 2, "they wait for one who measures"
    measured = ended(start(folder, "worker", "kill", *state, "--role", "measure", cwd=elsewhere))
    assert measured[0] == 0, measured[2]
    assert measured[1]["trials"] == [row.number for row in built]
    assert ended(builder)[0] == 0
    require_whole(folder, ledger)
    for row in built:
        timings = ledger.result(row.number)["timings_s"]
        assert any(stage.startswith("measure/") for stage in timings)


def _reopen(folder: Path, *, trials: int) -> None:
    """Give the study another budget, as the same sweep with another number of trials does."""
    import sqlite3

    with sqlite3.connect(folder / ".edgeopt" / "studies.db") as store:
        (text,) = store.execute("select sweep from edgeopt_studies").fetchone()
        saved: dict[str, Any] = json.loads(text)
        saved["config"]["search"]["trials"] = trials
        store.execute("update edgeopt_studies set sweep = ?", (json.dumps(saved),))


def test_a_worker_of_another_version_is_refused_while_others_work(folder: Path) -> None:
    assert sweep(folder, "search.trials=1", "promote=null")[0] == 0
    other = Member(worker="other", host="elsewhere", process="1:1", role="all", code="0.0.1+abc", beat=0)
    ledger_of(folder).join(other)
    _reopen(folder, trials=2)
    code, _, err = ended(start(folder, "worker", "kill"))
    assert code == 2
    assert "worker other of study 'kill' runs 0.0.1+abc" in err
    assert len(ledger_of(folder).changes(0)) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["workers=0"], "`workers` must be a positive integer, got 0"),
        (["store=postgresql://me:secret@db/studies"], "a password in a config would be logged"),
        (["store=mysql://db/studies"], "studies are not kept in mysql"),
        (["search.stagnation=0"], "0 is too few"),
        (["search.time=soon"], "'soon' is not a quantity"),
        (["search.energy='0 J'"], "allows no trial"),
        (["search.sampler=guess"], "guess"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(folder: Path, arguments: list[str], told: str) -> None:
    code, document, err = sweep(folder, *arguments)
    assert (code, document) == (2, {}), err
    assert told in err
    assert "secret" not in err
    assert len(err.strip().splitlines()) == 1
    assert not (folder / "mlflow.db").exists()


def test_a_study_that_is_not_there_is_told_with_those_that_are(folder: Path) -> None:
    trial_stores.opened(ledger_of(folder).url, "kill")
    for command in ("worker", "status", "front"):
        code, _, err = ended(start(folder, command, "other"))
        assert code == 2
        assert "there is no study 'other'" in err
        assert "Choose one of: kill" in err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_workers_and_database_may_die_at_any_time(folder: Path, postgresql: Postgres) -> None:
    store, chance = postgresql.database(), random.Random(3)
    process = start(folder, "sweep", "--config-name", "tiny_sweep", "workers=3", "promote=null", store=store)
    ledger, seen, kills = Ledger(store, "kill"), {}, 0
    while process.poll() is None:
        time.sleep(chance.uniform(2, 6))
        if kills == 4:
            postgresql.restart()
        workers = workers_of(process.pid)
        if kills < 8 and workers:
            chance.choice(workers).send_signal(signal.SIGKILL)
            kills += 1
        try:
            over = {row.number: row.summary for row in ledger.changes(0) if row.state in DONE}
        except Exception:
            continue
        assert seen.items() <= over.items(), "a finished trial was lost or changed"
        seen = over
    assert ended(process)[0] == 0
    assert len(seen) <= len([row for row in ledger.changes(0) if row.state in DONE]) == 5
    require_whole(folder, ledger)


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
def test_a_ray_cluster_builds_anywhere_and_measures_on_the_device_although_a_node_dies(folder: Path) -> None:
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
    require_whole(folder, ledger_of(folder))
    rows = ledger_of(folder).changes(0)
    assert [row.state for row in rows] == ["finished"] * 5
    assert all(row.built for row in rows)
