"""The files that a trial's run keeps."""

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


def log(run: Run, config: Mapping[str, Any], result: TrialResult, *, tracking_uri: str) -> list[str]:
    """Config, result and whatever the trial keeps, each by its name; paths of those that are tables.

    MLflow's client would read the run once more to find out where its files lie.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "config.yaml").write_text(as_yaml(config))
        (folder / "result.json").write_text(_as_json(result.to_json()))
        if result.failure is not None:
            cause = result.failure
            (folder / "failure.txt").write_text(f"stage: {cause.stage}\nerror: {cause.kind}\n\n{cause.message}\n")
        for name, source in result.artifacts.items():
            path, kept = Path(source), folder / name
            kept.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, kept)
            else:
                shutil.copyfile(path, kept)
        if result.engine is not None:
            (folder / TABLES).mkdir(exist_ok=True)
            spec = Engine.read(Path(result.engine["directory"])).spec
            for name, table in {"checks": _checks(result), "layers": _layers(spec)}.items():
                (folder / TABLES / f"{name}.json").write_text(json.dumps(mlflow_fields.plain(table)))
        get_artifact_repository(run.info.artifact_uri, tracking_uri=tracking_uri).log_artifacts(scratch)
        return sorted(path.relative_to(folder).as_posix() for path in (folder / TABLES).glob("*.json"))


def _checks(result: TrialResult) -> dict[str, list[Any]]:
    """What was looked for in the engine beside its figures: slow paths, and whether it computes what torch does."""
    lint = [["lint", note.removeprefix("lint: "), None, ""] for note in result.notes if note.startswith("lint: ")]
    parity = [
        ["parity", m.metric, m.value, m.method] for m in result.measurements if m.metric.startswith("quality/parity")
    ]
    clean = [["lint", "no known slow path", None, ""]]
    return {"columns": ["check", "finding", "value", "method"], "data": [*(lint or clean), *parity]}


def _layers(spec: ModelSpec) -> dict[str, list[Any]]:
    """Sizes of every layer, and how its matrices and the tables are stored."""
    rows = [
        [
            str(number),
            layer.intermediate_size,
            layer.heads,
            layer.kv_heads,
            *(_stored(spec, f"layers.{number}.{unit}") for unit in UNITS),
        ]
        for number, layer in enumerate(spec.layers)
    ]
    rows += [[table, None, None, None, _stored(spec, table), "", "", ""] for table in (EMBEDDING, LM_HEAD)]
    columns = ["layer", "MLP channels", "query heads", "key-value heads", *UNITS]
    return {"columns": columns, "data": rows}


def _stored(spec: ModelSpec, name: str) -> str:
    """How the matrices of a unit are stored, as `4 bits in blocks of 32`."""
    grid = spec.schemes.get(name)
    if grid is None:
        return spec.weight_dtype
    inputs = "" if grid.inputs == "float" else f", inputs in 8 bits ({grid.inputs})"
    blocks = f" in blocks of {grid.block_size}" if grid.inputs == "float" else ""
    return f"{grid.bits} bits{blocks}{inputs}"


def _as_json(document: Mapping[str, Any]) -> str:
    """An entry a line: strict JSON."""
    entries = mlflow_fields.plain(document).items()
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in entries]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def as_yaml(config: Mapping[str, Any]) -> str:
    safe = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # in C five times as fast, where PyYAML was built with it
    return str(yaml.dump(mlflow_fields.plain(config), Dumper=safe, sort_keys=False, allow_unicode=True))
