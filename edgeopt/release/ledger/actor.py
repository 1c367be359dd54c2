"""Who does something to a registered model."""

from __future__ import annotations

import getpass
import os

from mlflow.utils.credentials import read_mlflow_creds


def actor() -> str:
    """The user as whom MLflow is asked, where one is set up, else the one of this machine."""
    known = read_mlflow_creds().username
    if known:
        return str(known)
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number that has no name
        return f"uid {os.getuid()}"
