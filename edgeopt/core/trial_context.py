"""Pass the current trial to user code and child processes, as MLflow tags in an environment variable."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

from edgeopt.core import mlflow_tags as tags

VARIABLE = "EDGEOPT_CONTEXT"


@contextmanager
def trial_environment(study: str, number: int, recipe: str) -> Iterator[None]:
    """Set the current trial for this process and for the processes started inside the block."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = json.dumps({tags.STUDY: study, tags.TRIAL: f"{study}/{number}", tags.RECIPE: recipe})
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def current_trial_tags() -> dict[str, str]:
    """Return the MLflow tags of the current trial, or an empty mapping outside of a trial."""
    trial_tags: dict[str, str] = json.loads(os.environ.get(VARIABLE, "{}"))
    return trial_tags
