"""Evaluate trials inside the trial subprocess, and limit the output of other libraries."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import cache

from edgeopt.config.assemble import Request, build_job, empty_result, open_cache
from edgeopt.core.result import Failure, TrialResult
from edgeopt.errors import EdgeoptError
from edgeopt.machine.codecarbon_meter import EnergyMeter
from edgeopt.machine.utilization import UtilizationMonitor
from edgeopt.pipeline.evaluate import evaluate
from edgeopt.search.space.parameter import Params

NOISY_LOGGERS = ("transformers", "codecarbon", "alembic", "mlflow", "onnx_ir", "gguf")

_cache_protection = ExitStack()
"""Protects the cache entries of this process's last result from eviction until the result is recorded."""


def evaluate_trial(
    request: Request, params: Params, progress: Callable[[str], None], *, build_only: bool = False
) -> TrialResult:
    """Compose and evaluate one trial, or only build its engine. Invalid parameters give a result with a failure.

    The cache entries in the result are protected from eviction until this process evaluates the next trial or ends.
    """
    silence_libraries()
    _cache_protection.close()
    meter = _energy_meter()
    try:
        config = request.compose(params)
        job = build_job(config, request.config_dir)
        stage_cache = open_cache(config)
    except EdgeoptError as error:
        failure = Failure(stage="config", kind=type(error).__name__, message=str(error))
        return replace(empty_result(request, params), failure=failure)
    _cache_protection.enter_context(stage_cache.protect(progress))
    meter.joules()  # reset: the next call returns the energy since this one
    result = with_utilization(lambda: evaluate(job, stage_cache, progress, build_only=build_only))
    return replace(result, energy_j=meter.joules(), energy_method=meter.method)


def with_utilization(evaluation: Callable[[], TrialResult]) -> TrialResult:
    """Run an evaluation and add the utilization of the machine to its result."""
    with UtilizationMonitor() as monitor:
        result = evaluation()
    return replace(result, system=tuple(monitor.readings))


def prepare() -> None:
    """Import torch and start the energy meter ahead of the first trial, because both take seconds."""
    import torch  # noqa: F401

    silence_libraries()
    _energy_meter()


@cache
def _energy_meter() -> EnergyMeter:
    return EnergyMeter()


def silence_libraries() -> None:
    """Disable the progress bars of other libraries and hide their log messages, except errors.

    The progress bars are also disabled in children of this process.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
