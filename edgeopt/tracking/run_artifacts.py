"""Log the artifacts of a trial's run: config, result, cause of failure and tables."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from mlflow.entities import Run
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from edgeopt.core.artifact import Engine
from edgeopt.core.model_spec import EMBEDDING, LM_HEAD, UNITS, ModelSpec
from edgeopt.core.result import TrialResult
from edgeopt.tracking import mlflow_fields

TABLES = "tables"
"""Artifact folder of the tables that the MLflow UI shows."""


def log_artifacts(run: Run, config: Mapping[str, Any], result: TrialResult, *, tracking_uri: str) -> list[str]:
    """Log config, result and the artifacts of a trial, and return the paths of its tables."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "config.yaml").write_text(as_yaml(config))
        (folder / "result.json").write_text(_as_json(result.to_json()))
        if result.failure is not None:
            cause = result.failure
            (folder / "failure.txt").write_text(f"stage: {cause.stage}\nerror: {cause.kind}\n\n{cause.message}\n")
        for name, source in result.artifacts.items():
            path, copied = Path(source), folder / name
            copied.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, copied)
            else:
                shutil.copyfile(path, copied)
        if result.engine is not None:
            (folder / TABLES).mkdir(exist_ok=True)
            spec = Engine.read(Path(result.engine.directory)).spec
            for name, table in {"checks": _check_table(result), "layers": _layer_table(spec)}.items():
                (folder / TABLES / f"{name}.json").write_text(json.dumps(mlflow_fields.to_json_types(table)))
        # MlflowClient.log_artifacts would fetch the run again to find its artifact location
        get_artifact_repository(run.info.artifact_uri, tracking_uri=tracking_uri).log_artifacts(scratch)
        return sorted(path.relative_to(folder).as_posix() for path in (folder / TABLES).glob("*.json"))


def _check_table(result: TrialResult) -> dict[str, list[Any]]:
    """Return the lint findings of the engine and its differences from PyTorch."""
    lint = [["lint", note.removeprefix("lint: "), None, ""] for note in result.notes if note.startswith("lint: ")]
    parity = [
        ["parity", m.metric, m.value, m.method] for m in result.measurements if m.metric.startswith("quality/parity")
    ]
    no_findings = [["lint", "no known slow path", None, ""]]
    return {"columns": ["check", "finding", "value", "method"], "data": [*(lint or no_findings), *parity]}


def _layer_table(spec: ModelSpec) -> dict[str, list[Any]]:
    """Return the sizes of each layer and the storage format of its matrices, the embedding and the LM head."""
    rows = [
        [
            str(number),
            layer.intermediate_size,
            layer.heads,
            layer.kv_heads,
            *(_storage_format(spec, f"layers.{number}.{unit}") for unit in UNITS),
        ]
        for number, layer in enumerate(spec.layers)
    ]
    rows += [[table, None, None, None, _storage_format(spec, table), "", "", ""] for table in (EMBEDDING, LM_HEAD)]
    columns = ["layer", "MLP channels", "query heads", "key-value heads", *UNITS]
    return {"columns": columns, "data": rows}


def _storage_format(spec: ModelSpec, name: str) -> str:
    """Return how the matrices of a unit are stored, such as `4 bits in blocks of 32`."""
    scheme = spec.schemes.get(name)
    if scheme is None:
        return spec.weight_dtype
    inputs = "" if scheme.inputs == "float" else f", inputs in 8 bits ({scheme.inputs})"
    blocks = f" in blocks of {scheme.block_size}" if scheme.inputs == "float" else ""
    return f"{scheme.bits} bits{blocks}{inputs}"


def _as_json(document: Mapping[str, Any]) -> str:
    """Return strict JSON with one top-level entry per line."""
    entries = mlflow_fields.to_json_types(document).items()
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in entries]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def as_yaml(config: Mapping[str, Any]) -> str:
    """Return a config as YAML, with its keys in their order."""
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # the C implementation is five times as fast
    return str(yaml.dump(mlflow_fields.to_json_types(config), Dumper=dumper, sort_keys=False, allow_unicode=True))
