"""Test the tags that MLflow adds to runs inside a trial, without changes to the application."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.tracking.context.registry import resolve_tags

from edgeopt.core import mlflow_tags as tags
from edgeopt.core import trial_context


def test_runs_outside_trial_get_no_tags() -> None:
    assert not any(name.startswith("edgeopt.") for name in resolve_tags())


def test_runs_inside_trial_get_its_tags() -> None:
    with trial_context.trial_environment("night", 7, "step.quantize.bits=4"):
        resolved = resolve_tags()
    assert resolved[tags.STUDY] == "night"
    assert resolved[tags.TRIAL] == "night/7"
    assert resolved[tags.RECIPE] == "step.quantize.bits=4"
    assert resolved[tags.DEVICE]
    assert resolved[tags.VERSION_PREFIX + "mlflow"]
    assert tags.ROLE not in resolved, "only edgeopt's own runs have a role"
    assert trial_context.current_trial_tags() == {}


def test_nested_trial_restores_outer_trial() -> None:
    with trial_context.trial_environment("s", 1, ""):
        with trial_context.trial_environment("s", 2, ""):
            assert trial_context.current_trial_tags()[tags.TRIAL] == "s/2"
        assert trial_context.current_trial_tags()[tags.TRIAL] == "s/1"


APPLICATION = """
import hydra, mlflow

@hydra.main(version_base=None, config_path=None, config_name=None)
def main(config):
    with mlflow.start_run():
        mlflow.log_metric("loss", config.x)
    return config.x

main()
"""


@pytest.mark.timeout(180)
def test_runs_of_swept_application_get_tags(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APPLICATION)
    arguments = ["hydra/sweeper=edgeopt", "hydra.sweeper.trials=2", "hydra.sweep.dir=out", "+x=1,2"]
    command = [sys.executable, "app.py", "-m", *arguments]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs(["0"])
    study = runs[0].data.tags[tags.STUDY]
    assert sorted(run.data.tags[tags.TRIAL] for run in runs) == [f"{study}/0", f"{study}/1"]
