"""Find, measure and release the compressed version of a language model that fits a device.

    import edgeopt

    study = edgeopt.sweep(model="./my-llama", limits={"memory.peak_rss_mib": "200 MiB"})
    study.front.to_pandas()
    edgeopt.promote(study)

Every public name is imported on first use, so that `import edgeopt` takes milliseconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeopt.api import (
        Champion,
        LoadedEngine,
        Measurement,
        Promotion,
        RecipePrediction,
        Rollback,
        SingleRun,
        Study,
        StudySnapshot,
        Target,
        TrialResult,
        Trials,
        TrialSnapshot,
        Verdict,
        Verification,
        load_engine,
        load_study,
        predict,
        profile,
        promote,
        rollback,
        run,
        sweep,
        verify,
    )
    from edgeopt.errors import (
        ApprovalPendingError,
        BuildError,
        ConfigError,
        EdgeoptError,
        GateError,
        InfeasibleError,
        InputError,
        MeasureError,
        StepError,
        StoreError,
        TrackingError,
        UnreachableError,
    )

__version__ = "0.1.0"

__all__ = [
    "ApprovalPendingError",
    "BuildError",
    "Champion",
    "ConfigError",
    "EdgeoptError",
    "GateError",
    "InfeasibleError",
    "InputError",
    "LoadedEngine",
    "Measurement",
    "MeasureError",
    "Promotion",
    "RecipePrediction",
    "Rollback",
    "SingleRun",
    "StepError",
    "StoreError",
    "Study",
    "StudySnapshot",
    "Target",
    "TrackingError",
    "TrialResult",
    "TrialSnapshot",
    "Trials",
    "UnreachableError",
    "Verdict",
    "Verification",
    "__version__",
    "load_engine",
    "load_study",
    "predict",
    "profile",
    "promote",
    "rollback",
    "run",
    "sweep",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'edgeopt' has no attribute {name!r}")
    return getattr(import_module("edgeopt.errors" if name.endswith("Error") else "edgeopt.api"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
