"""Runs that are logged inside a trial say of which trial, without a line of the application's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.tracking.context.registry import resolve_tags

from edgeopt.core import mlflow_tags as tags
from edgeopt.core import trial_context


def test_outside_a_trial_nothing_is_said() -> None:
    assert not any(name.startswith("edgeopt.") for name in resolve_tags())


def test_inside_a_trial_runs_get_its_study_number_recipe_device_and_versions() -> None:
    with trial_context.trial_environment("night", 7, "step.quantize.bits=4"):
        found = resolve_tags()
    assert found[tags.STUDY] == "night"
    assert found[tags.TRIAL] == "night/7"
    assert found[tags.RECIPE] == "step.quantize.bits=4"
    assert found[tags.DEVICE]
    assert found[tags.VERSION_PREFIX + "mlflow"]
    assert tags.ROLE not in found, "it is no run of a sweep's own"
    assert trial_context.known() == {}


def test_one_trial_inside_another_is_told_and_then_the_outer_one_again() -> None:
    with trial_context.trial_environment("s", 1, ""):
        with trial_context.trial_environment("s", 2, ""):
            assert trial_context.known()[tags.TRIAL] == "s/2"
        assert trial_context.known()[tags.TRIAL] == "s/1"


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
def test_an_application_swept_by_hydra_has_them_on_its_own_runs(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APPLICATION)
    given = ["hydra/sweeper=edgeopt", "hydra.sweeper.trials=2", "hydra.sweep.dir=out", "+x=1,2"]
    command = [sys.executable, "app.py", "-m", *given]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    logged = client.search_runs(["0"])
    study = logged[0].data.tags[tags.STUDY]
    assert sorted(run.data.tags[tags.TRIAL] for run in logged) == [f"{study}/0", f"{study}/1"]
