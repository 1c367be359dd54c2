"""The trial that a process works on, told to whatever runs inside it: tags in an environment variable."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

from edgeopt.core import mlflow_tags as tags

VARIABLE = "EDGEOPT_CONTEXT"


@contextmanager
def trial_environment(study: str, number: int, recipe: str) -> Iterator[None]:
    """Inside the block, and in processes that are started there, `known` tells of this trial."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = json.dumps({tags.STUDY: study, tags.TRIAL: f"{study}/{number}", tags.RECIPE: recipe})
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def known() -> dict[str, str]:
    """Tags of the trial that this process works on; empty where it works on none."""
    found: dict[str, str] = json.loads(os.environ.get(VARIABLE, "{}"))
    return found
