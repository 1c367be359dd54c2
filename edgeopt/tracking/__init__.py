"""Record studies and trials in MLflow and draw the Pareto front.

Importing this package does not import MLflow. Commands that do not use MLflow therefore start quickly.
"""

import os

# Names of models and devices are private to the user. MLflow sends usage data unless this variable is set.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
