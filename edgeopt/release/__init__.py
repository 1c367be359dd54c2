"""From the front to the registry: policy, gates, promotion. MLflow is imported with the files, not with the package."""

import os

# as in edgeopt.tracking: nothing about models and devices leaves the user's machines unasked
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
