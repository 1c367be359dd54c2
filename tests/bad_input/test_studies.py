"""Check the errors of commands that read a study."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeopt.config import assemble
from edgeopt.studies.open_study import OpenStudy

from .conftest import ErrorOf


@pytest.fixture
def study(work: Path, registry: str) -> str:
    """Return the name of a study without trials."""
    request = assemble.Request(name="reference", overrides=(f"tracking.tracking_uri='{registry}'",))
    opened = OpenStudy.from_config(request, request.compose())
    opened.open()
    return opened.name


@pytest.mark.parametrize("command", ["front", "promote"])
def test_missing_study_is_reported(command: str, error_of: ErrorOf) -> None:
    assert "there is no study. Run edgeopt sweep first" in error_of(command)
    assert "there is no study" in error_of(command, "reference", "--state", "elsewhere")


@pytest.mark.parametrize("command", ["front", "promote"])
def test_unknown_study_error_lists_studies(command: str, error_of: ErrorOf, study: str) -> None:
    line = error_of(command, "nope")
    assert "there is no study 'nope'" in line
    assert study in line


def test_unknown_policy_error_lists_policies(error_of: ErrorOf, study: str) -> None:
    line = error_of("promote", study, "--policy", "nope")
    assert "nope.yaml" in line
    assert "default.yaml" in line


def test_study_without_feasible_trial_promotes_nothing(error_of: ErrorOf, study: str) -> None:
    assert "nothing was promoted" in error_of("promote", study, code=3)
