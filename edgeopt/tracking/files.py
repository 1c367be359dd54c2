"""The files that a trial's run keeps."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient

from edgeopt.result import TrialResult
from edgeopt.tracking import fields


def log(client: MlflowClient, run_id: str, config: Mapping[str, Any], result: TrialResult) -> None:
    """Config, result and whatever the trial keeps, each by its name."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "config.yaml").write_text(as_yaml(config))
        (folder / "result.json").write_text(json.dumps(fields.plain(result.to_json()), indent=1, allow_nan=False))
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
        client.log_artifacts(run_id, scratch)


def as_yaml(config: Mapping[str, Any]) -> str:
    safe = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # in C five times as fast, where PyYAML was built with it
    return str(yaml.dump(fields.plain(config), Dumper=safe, sort_keys=False, allow_unicode=True))
