"""Release the front of a study: policies, gates, promotion, ledger and registry.

MLflow is imported by the modules, not by the package.
"""

import os

# as in edgeopt.tracking: edgeopt sends no data about models or devices without the user's consent
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
