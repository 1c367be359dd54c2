"""Write the raw samples of a measurement: `samples.json`, `tables/` and `logs/`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeopt.measure.harness.tables import build_tables

SAMPLES, TABLES, LOGS = "samples.json", "tables", "logs"


def write(record: Mapping[str, Any], directory: Path) -> None:
    """Write `record` to `samples.json`. It describes the engine, the workload and, in `runs`, each process."""
    (directory / SAMPLES).write_text(json.dumps(record))


def merge(folders: Sequence[Path], directory: Path) -> None:
    """Merge the samples and logs of one engine's measurements in `folders`, and write them and tables to `directory`.

    If the workloads differ, the record has the workload of the last folder.
    """
    records = [json.loads((folder / SAMPLES).read_text()) for folder in folders]
    merged = {key: value for record in records for key, value in record.items()}
    runs = [run for record in records for run in record["runs"]]
    write({**merged, "runs": runs}, directory)
    (directory / TABLES).mkdir()
    for name, table in build_tables(runs).items():
        (directory / TABLES / f"{name}.json").write_text(json.dumps(table))
    for folder in folders:
        shutil.copytree(folder / LOGS, directory / LOGS, dirs_exist_ok=True)  # file names start with the group
