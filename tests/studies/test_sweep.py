"""Run whole sweeps of a tiny model, including a sweep that is killed."""

from __future__ import annotations

import json
import random
import re
import signal
import time

import pytest
from mlflow import MlflowClient
from support.sweeping import finished, front, runs, start, sweep, write_sweep


def test_sweep_promotes_its_front_once(folder):
    code, document, err = sweep(folder)
    assert code == 0, err
    assert len(document["trials"]) == 5
    assert {t["state"] for t in document["trials"]} == {"finished"}
    ranks = {t["number"]: t["pareto_rank"] for t in document["trials"]}
    assert document["front"] == sorted(n for n, rank in ranks.items() if rank == 1) != []
    assert document["champion"]["name"] == "tiny"
    assert {r.info.status for r in runs(folder)} == {"FINISHED"}
    assert len(runs(folder)) == 1 + 5

    code, repeated, err = sweep(folder)
    assert code == 0, err
    assert len(runs(folder)) == 1 + 5
    assert repeated["front"] == document["front"]
    assert repeated["champion"] == document["champion"]


def test_front_command_reads_champion_from_registry(folder, tiny_model):
    code, document, err = sweep(folder)
    assert code == 0, err
    shown = front(folder)
    assert shown["champion"] == document["champion"]
    assert shown["trials"] == document["trials"]
    MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db").delete_registered_model_alias("tiny", "champion")
    assert front(folder)["champion"] is None

    write_sweep(folder, tiny_model, limits="{size: {engine_mib: 1 B}}", trials=1)
    assert sweep(folder, "search.study=apart")[0] == 3
    (folder / "mlflow.db").unlink()
    assert front(folder, "apart")["champion"] is None
    assert not (folder / "mlflow.db").exists()


def test_impossible_limit_exits_with_3(folder, tiny_model):
    write_sweep(folder, tiny_model, limits="{size: {engine_mib: 1 B}}", trials=3)
    code, document, err = sweep(folder)
    assert code == 3
    assert "no trial satisfies every limit" in err
    assert document["front"] == []
    assert document["champion"] is None
    assert MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db").search_registered_models() == []


def test_predicted_oversize_recipe_is_refused(folder, tiny_model):
    # the fp16 engine takes 236 kB, the int8 engine about 140 kB
    write_sweep(folder, tiny_model, limits="{size: {engine_mib: 190 kB}}", trials=6)
    code, document, err = sweep(folder)
    assert code == 0, err
    (refused,) = (t for t in document["trials"] if t["state"] == "refused")
    assert refused["params"] == {"recipe": "fp16"}
    assert not refused["feasible"]
    assert refused["metrics"] == {}
    assert refused["predicted"]["size/engine_mib"] > 190e3 / 2**20
    assert refused["excess"]["size/engine_mib"] > 0
    (run,) = (r for r in runs(folder) if r.info.run_id == refused["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["edgeopt.refused"] == "prediction"
    assert run.data.metrics["predicted_excess/size/engine_mib"] > 0
    assert not any(name.startswith(("excess/", "size/", "time/compress")) for name in run.data.metrics)
    measured = {t["number"]: t for t in document["trials"] if t["state"] == "finished"}
    for trial in measured.values():
        ratio = trial["metrics"]["size/engine_mib"] / trial["predicted"]["size/engine_mib"]
        assert 0.98 < ratio < 1.02, trial["params"]


def test_limit_of_disabled_probe_is_violated(folder, tiny_model):
    write_sweep(folder, tiny_model, limits="{latency: {decode_p50_ms: 1000 s}}", trials=3)
    code, document, err = sweep(folder)
    assert code == 3
    assert re.search(r"· trial 0 \S+ .*\(\d+ s\): infeasible: latency/decode_p50_ms: not measured", err), err
    assert not any(t["feasible"] for t in document["trials"])
    assert all(t["excess"] == {"latency/decode_p50_ms": None} for t in document["trials"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_sweep_logs_every_trial_once(folder):
    rng = random.Random(7)
    known: dict[int, str] = {}
    for _ in range(5):
        process = start(folder, "sweep", "--config-name", "tiny_sweep")
        time.sleep(rng.uniform(3, 20))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        trials = finished(folder)
        assert known.items() <= trials.items(), "a finished trial was lost or changed"
        known = trials
    code, document, err = sweep(folder)
    assert code == 0, err
    results = {t["number"]: t for t in document["trials"] if t["state"] == "finished"}
    assert known.keys() <= results.keys()
    assert len(results) == 5
    assert len({json.dumps(t["params"], sort_keys=True) for t in results.values()}) == 5
    logged = runs(folder)
    assert not [r for r in logged if r.info.status == "RUNNING"]
    keys = [
        r.data.tags["edgeopt.trial"] for r in logged if r.info.status == "FINISHED" and "edgeopt.trial" in r.data.tags
    ]
    assert len(keys) == len(set(keys)) == 5
