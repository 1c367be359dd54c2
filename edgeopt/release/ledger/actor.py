"""Name the user who changes a registered model."""

from __future__ import annotations

import getpass
import os

from mlflow.utils.credentials import read_mlflow_creds


def actor() -> str:
    """Return the MLflow user if one is configured, else the user of the operating system."""
    mlflow_user = read_mlflow_creds().username
    if mlflow_user:
        return str(mlflow_user)
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container, the user id may have no name
        return f"uid {os.getuid()}"
