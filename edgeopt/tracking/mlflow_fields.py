"""Convert a trial to MLflow params, metrics, tags and datasets within MLflow's length limits."""

from __future__ import annotations

import hashlib
import json
import math
import posixpath
import re
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

import edgeopt
from edgeopt.core import library_versions
from edgeopt.core import mlflow_tags as tags
from edgeopt.core.corpus import TextSummary
from edgeopt.core.result import TrialResult

SERVICE_LIBRARIES = ("optuna", "mlflow")
"""Libraries that do not change an engine, but are recorded too."""
STUDY_SECTIONS = ("search", "tracking", "promote", "state", "store", "workers", "cache")
"""Sections of a config that are equal in all trials of a study. The run of the study keeps them in config.yaml."""
KEY_LENGTH = 250
VALUE_LENGTH = 6000
TAG_LENGTH = 8000
DIGEST_LENGTH = 36
SYSTEM_METRICS_PREFIX = "system/"
_TRUNCATED = " … (truncated, config.yaml has the complete value)"


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested mappings as `a.b.c` and lists of mappings as `a.0.b`; values become JSON except strings."""
    return dict(_leaves(data, prefix)) if data else {}


def _leaves(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{key}.{number}")
    else:
        yield key, value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def trial_params(config: Mapping[str, Any], searched: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Return the params of a trial's run and the names of truncated ones.

    The params are the sections of `config` that belong to the trial, and the `searched` parameters.
    """
    sections = {name: value for name, value in config.items() if name not in STUDY_SECTIONS}
    return fit_params({**flatten(sections), **flatten(searched)})


def fit_params(values: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return `values` within MLflow's lengths and alphabet, and the names whose value was truncated."""
    params, truncated = {}, []
    for key, value in values.items():
        name = _fit_name(key)
        if len(value) > VALUE_LENGTH:
            value = value[: VALUE_LENGTH - len(_TRUNCATED)] + _TRUNCATED
            truncated.append(name)
        params[name] = value
    return params, truncated


def _fit_name(name: str) -> str:
    allowed = re.sub(r"[^\w./ :-]", "_", name)
    # MLflow normalizes a name like a path
    if posixpath.normpath(allowed) != allowed or allowed.startswith((".", "/")):
        allowed = "_" + allowed.replace("/", "_").replace(".", "_")
    if len(allowed) <= KEY_LENGTH:
        return allowed
    return f"{allowed[: KEY_LENGTH - 17]}~{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def trial_metrics(result: TrialResult) -> tuple[dict[str, float], list[str]]:
    """Return the metrics of a trial's run, and the names of those left out because they are not finite.

    Beside the measurements these are `excess/<metric>`, `time/<stage>_s`, `time_saved/<stage>_s` and `feasible`.
    Predictions become `predicted/<metric>` and `predicted_excess/<metric>`.

    Infinite values are left out because MLflow stores infinity as 1.8e308, which looks like a measurement.
    """
    metrics: dict[str, float] = {m.metric: m.value for m in result.measurements}
    metrics |= {f"predicted/{m.metric}": m.value for m in result.predictions}
    prefix = {True: "predicted_excess", False: "excess"}
    metrics |= {f"{prefix[v.predicted]}/{v.metric}": v.excess for v in result.verdicts if v.excess is not None}
    metrics |= {f"time/{stage}_s": seconds for stage, seconds in result.timings_s.items()}
    metrics |= {f"time_saved/{stage}_s": seconds for stage, seconds in result.saved_s.items()}
    if result.energy_method:
        kind = "estimated" if "estimated" in result.energy_method else "measured"
        metrics[f"spent/{kind}/energy_j"] = result.energy_j
    metrics[tags.FEASIBLE] = float(result.feasible)
    finite = {_fit_name(name): float(value) for name, value in metrics.items() if math.isfinite(value)}
    return finite, sorted(name for name, value in metrics.items() if not math.isfinite(value))


def dataset_inputs(result: TrialResult) -> list[DatasetInput]:
    """Return the texts of a trial as MLflow datasets, each tagged with its use: calibration or evaluation."""
    return [
        DatasetInput(
            Dataset(
                name=text.name[:KEY_LENGTH],
                digest=_dataset_digest(text),
                source_type="text",
                source=json.dumps({"name": text.name, "sha256": text.digest}),
                profile=json.dumps({"documents": text.documents, "characters": text.characters}),
            ),
            tags=[InputTag(MLFLOW_DATASET_CONTEXT, use)],
        )
        for use, text in result.texts.items()
    ]


def metric_entities(
    result: TrialResult, values: Mapping[str, float], *, run_id: str, model_id: str | None, at_ms: int
) -> list[Metric]:
    """Return the metrics of a run, linked to its logged model; quality metrics also to the evaluation text.

    All metrics have the time stamp `at_ms`. MLflow drops a metric that it already has with the same time stamp, so
    logging again after an interruption adds nothing.
    """
    text = result.texts.get("evaluation")
    evaluation = (text.name[:KEY_LENGTH], _dataset_digest(text)) if text is not None else (None, None)
    entities = []
    for name, value in values.items():
        dataset, digest = evaluation if name.startswith("quality/") else (None, None)
        entities.append(
            Metric(name, value, at_ms, 0, model_id=model_id, dataset_name=dataset, dataset_digest=digest, run_id=run_id)
        )
    return entities + [
        Metric(f"{SYSTEM_METRICS_PREFIX}{name}", value, int(1000 * reading.at_s), step)
        for step, reading in enumerate(result.system)
        for name, value in reading.values.items()
    ]


def _dataset_digest(text: TextSummary) -> str:
    return text.digest[:DIGEST_LENGTH]


def trial_tags(result: TrialResult) -> dict[str, str]:
    """Return the tags of a trial's run: recipe, device, library versions and the cause of a failure."""
    run_tags = {
        tags.RECIPE: result.recipe_text,
        tags.RECIPE_DIGEST: result.recipe_digest,
        tags.TARGET: result.target,
        tags.DEVICE: result.device_name,
        tags.EMULATED: "true" if result.emulated else "false",
        **environment_tags(),
    }
    if result.engine is not None:
        run_tags[tags.ENGINE_DIGEST] = result.engine.digest
        run_tags[tags.MANIFEST_SHA256] = result.engine.manifest_sha256
    if result.refused:
        run_tags[tags.REFUSED] = result.refused
    if result.failure is not None:
        run_tags[tags.FAILURE] = f"{result.failure.stage}: {result.failure.kind}: {result.failure.message}"
    return {key: value[:TAG_LENGTH] for key, value in run_tags.items() if value}


@cache
def environment_tags() -> dict[str, str]:
    """Return tags with the library versions and the git commit of the working folder, or else of edgeopt."""
    versions = {"edgeopt": edgeopt.__version__, **library_versions.versions()}
    versions |= library_versions.installed(SERVICE_LIBRARIES)
    run_tags = {tags.VERSION_PREFIX + name: version for name, version in versions.items()}
    commit = _commit(Path.cwd()) or _commit(Path(__file__).parent)
    if commit:
        run_tags |= {tags.GIT_COMMIT: commit, "mlflow.source.git.commit": commit.removesuffix("-dirty")}
    return run_tags


def _commit(folder: Path) -> str:
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""  # git is not installed or hangs; the tag is left out
    return answer.stdout.strip() if answer.returncode == 0 else ""


def to_json_types(value: Any) -> Any:
    """Return `value` as types of strict JSON; numbers that are not finite become strings such as `inf`."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): to_json_types(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json_types(item) for item in value]
    return value
