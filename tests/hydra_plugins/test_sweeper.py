"""Test `hydra/sweeper=edgeopt` under several launchers, with an application that does not import edgeopt."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from edgeopt.errors import ConfigError
from edgeopt.hydra_plugins.sweeping import _split_overrides

APPLICATION = """
import os
import hydra

@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(config):
    if config.x > 4:
        raise ValueError("too far")
    base = {"adam": 0.0, "sgd": 1.0}[config.optimizer.name]
    return {"loss": (config.x - 2) ** 2 + base, "cost": config.x + config.y, "pid": os.getpid()}

main()
"""
CONFIG = """
defaults:
  - optimizer: adam
  - _self_
  - override hydra/sweeper: edgeopt
x: 1.0
y: 0.0
hydra:
  sweeper:
    trials: 12
    objectives: {loss: minimize, cost: minimize}
    limits: {cost: 3.5}
"""
SWEEP_OVERRIDES = ("x=interval(0,5)", "optimizer=adam,sgd")


@pytest.fixture
def application(tmp_path: Path) -> Path:
    (tmp_path / "conf" / "optimizer").mkdir(parents=True)
    (tmp_path / "app.py").write_text(APPLICATION)
    (tmp_path / "conf" / "config.yaml").write_text(CONFIG)
    for name in ("adam", "sgd"):
        (tmp_path / "conf" / "optimizer" / f"{name}.yaml").write_text(f"name: {name}\n")
    return tmp_path


def run_sweep(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "app.py", "-m", "hydra.sweep.dir=out", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=180
    )


def read_front(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((folder / "out" / "front.yaml").read_text())
    return document


@pytest.mark.parametrize(
    ("launcher", "workers"),
    [
        ((), 1),
        (("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"), 2),
        (("hydra/launcher=submitit_local",), 2),
    ],
    ids=["basic", "joblib", "submitit"],
)
def test_workers_of_any_launcher_share_study(application: Path, launcher: tuple[str, ...], workers: int) -> None:
    process = run_sweep(application, *SWEEP_OVERRIDES, *launcher, f"hydra.sweeper.workers={workers}", "y=0.5")
    assert process.returncode == 0, process.stderr
    document = read_front(application)
    trials = {trial["number"]: trial for trial in document["trials"]}
    assert len(trials) == 12
    evaluated = [t for t in trials.values() if t["state"] == "finished"]
    assert {t["state"] for t in trials.values()} <= {"finished", "failed"}
    assert all("too far" in t["failure"] for t in trials.values() if t["state"] == "failed")
    assert 1 <= len({t["metrics"]["pid"] for t in evaluated}) <= workers
    with sqlite3.connect(application / "out" / "studies.db") as database:
        (joined,) = database.execute("select count(*) from edgeopt_workers").fetchone()
    assert joined == workers, "each job is one long-lived worker"
    for number in document["front"]:
        assert trials[number]["metrics"]["cost"] <= 3.5
        assert trials[number]["metrics"]["cost"] == pytest.approx(trials[number]["params"]["x"] + 0.5)
        assert (application / "out" / str(number) / ".hydra" / "overrides.yaml").is_file()
    assert {t["params"]["optimizer"] for t in evaluated} == {"adam", "sgd"}


def test_existing_study_is_continued(application: Path) -> None:
    assert run_sweep(application, *SWEEP_OVERRIDES, "hydra.sweeper.trials=3").returncode == 0
    first = read_front(application)["trials"]
    assert run_sweep(application, *SWEEP_OVERRIDES, "hydra.sweeper.trials=5").returncode == 0
    second = read_front(application)["trials"]
    assert [(t["params"], t["metrics"]) for t in second[:3]] == [(t["params"], t["metrics"]) for t in first]
    assert len(second) == 5


def test_changed_search_space_is_rejected(application: Path) -> None:
    assert run_sweep(application, *SWEEP_OVERRIDES, "hydra.sweeper.trials=2").returncode == 0
    process = run_sweep(application, "x=interval(0,1)", "hydra.sweeper.trials=2")
    assert process.returncode != 0
    assert "parameter x: stored" in process.stderr


def test_glob_override_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"arguments: .*choice, a range or an interval, got 'optimizer=glob\(\*\)'"):
        _split_overrides(["optimizer=glob(*)"])


def test_infeasible_study_is_an_error(application: Path) -> None:
    process = run_sweep(
        application, *SWEEP_OVERRIDES, "hydra.sweeper.trials=2", "hydra.sweeper.limits.cost=0.001", "y=1"
    )
    assert process.returncode != 0
    assert "no trial satisfies every limit" in process.stderr


def test_unexpected_return_value_fails_trial(application: Path) -> None:
    text = APPLICATION.replace('return {"loss"', 'return 1.0\n    return {"loss"')
    (application / "app.py").write_text(text)
    process = run_sweep(application, *SWEEP_OVERRIDES, "hydra.sweeper.trials=2", "hydra.sweeper.limits={}")
    assert process.returncode != 0
    assert "no trial satisfies every limit" in process.stderr
