"""Run sweeps of a tiny model in separate processes, as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from edgeopt.core import mlflow_tags as tags
from edgeopt.search.storage.database import file_url
from edgeopt.search.storage.trial import ENDED_STATES
from edgeopt.search.storage.trial_storage import TrialStorage, list_studies

STUDY = "toy"
SPACE = """
defaults:
  - config
  - _self_
model:
  _target_: edgeopt.models.local.LocalFolder
  path: {model}
target:
  context_length: 96
measure:
  prompt_lengths: [16]
  window_tokens: 64
  max_windows: 4
  foreign_cpu_share: 2.0
  halves_tolerance: 100.0
  slowed_share: 1.0
  retries: 0
  probes:
    energy: null
    latency: null
    parity: null
limits: {limits}
search:
  _target_: edgeopt.search.space.definition.Search
  study: toy
  objectives:
    quality/perplexity: minimize
    size/engine_mib: minimize
  parameters:
    recipe:
      choices: [int8, int4, fp16, prune_int4]
    step.prune.ratio:
      choices: [0.25, 0.5]
      when: {{recipe: [prune_int4]}}
  enqueue:
    - {{recipe: int8}}
  trials: {trials}
promote: tiny
"""
POLICY = """
model: tiny
aliases:
  champion:
    - {metric: quality/perplexity, direction: minimize, weight: 1.0}
"""


def prepare(folder: Path, model: Path, *, cache: Path | None = None) -> None:
    """Write a user's configs into `folder`, which is also the working folder. Use `cache` instead of its own cache."""
    if cache is not None:
        (folder / ".edgeopt").mkdir()
        (folder / ".edgeopt" / "cache").symlink_to(cache)
    (folder / "registry").mkdir()
    (folder / "registry" / "tiny.yaml").write_text(POLICY)
    write_sweep(folder, model, limits="{size: {engine_mib: 1 GiB}}")


def write_sweep(folder: Path, model: Path, *, limits: str, trials: int = 5) -> None:
    (folder / "tiny_sweep.yaml").write_text(SPACE.format(model=model, limits=limits, trials=trials))


def start(
    folder: Path, *arguments: str, cwd: Path | None = None, store: str = "", tracking_uri: str = ""
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "edgeopt.cli", *arguments, "--config-dir", str(folder), "--json"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "EDGEOPT_"))}
    if store:
        environment["EDGEOPT_STORE"] = store
    if tracking_uri:
        environment["MLFLOW_TRACKING_URI"] = tracking_uri
    return subprocess.Popen(
        command, cwd=cwd or folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, dict[str, Any], str]:
    """Wait for a command, and return its exit code, its JSON document and its stderr."""
    out, err = process.communicate(timeout=400)
    return process.returncode, json.loads(out) if out.strip() else {}, err


def sweep(folder: Path, *overrides: str, store: str = "") -> tuple[int, dict[str, Any], str]:
    return ended(start(folder, "sweep", "--config-name", "tiny_sweep", *overrides, store=store))


def front(folder: Path, study: str = STUDY) -> dict[str, Any]:
    code, document, err = ended(start(folder, "front", study))
    assert code == 0, err
    return document


def runs(folder: Path) -> list[Any]:
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    experiments = [e.experiment_id for e in client.search_experiments()]
    return list(client.search_runs(experiments, max_results=1000))


def open_storage(folder: Path) -> TrialStorage:
    return TrialStorage(file_url(folder / ".edgeopt" / "studies.db"), STUDY)


def require_whole(folder: Path, storage: TrialStorage) -> None:
    """Assert that every trial ended and was recorded once, under its last attempt, and that no run is open."""
    trials = storage.trials_since(0)
    assert not [
        trial for trial in trials if trial.state == "running" or (trial.state in ENDED_STATES and not trial.recorded)
    ]
    logged = [run for run in runs(folder) if tags.TRIAL in run.data.tags]
    assert not [run for run in logged if run.info.status == "RUNNING"]
    keys = [(run.data.tags[tags.TRIAL], run.data.tags[tags.ATTEMPT]) for run in logged]
    assert len(set(keys)) == len(keys)
    done = sorted(run.data.tags[tags.TRIAL] for run in logged if run.info.status == "FINISHED")
    assert done == sorted(
        f"{STUDY}/{trial.number}" for trial in trials if trial.state in ("finished", "stopped", "refused")
    )


def finished(folder: Path) -> dict[int, str]:
    """Return the stored results as JSON text by trial number."""
    file = folder / ".edgeopt" / "studies.db"
    if not file.is_file():
        return {}
    storage = open_storage(folder)
    if STUDY not in list_studies(storage.url):
        return {}
    done = [trial.number for trial in storage.trials_since(0) if trial.state == "finished"]
    return {number: json.dumps(storage.load_result(number), sort_keys=True) for number in done}
