"""Studies and trials in MLflow: the recorder, the engine flavor and the picture of the front.

Nothing here is imported with the package, so that MLflow starts with the first study and not with
`edgeopt --help`.
"""

import os

# figures of models and devices are the user's: MLflow reports usage to its makers unless told otherwise
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
