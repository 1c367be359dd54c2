"""What single processes reported, kept as files beside the figures: `samples.json`, `tables/` and `logs/`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeopt.measure.harness.tables import tables

SAMPLES, TABLES, LOGS = "samples.json", "tables", "logs"


def write(record: Mapping[str, Any], directory: Path) -> None:
    """Keep `record`: the engine, the workload and, in `runs`, what each process reported."""
    (directory / SAMPLES).write_text(json.dumps(record))


def merge(folders: Sequence[Path], directory: Path) -> None:
    """Write one record, its tables and one folder of logs from the measurements in `folders`, all of one engine.

    Where their workloads differ, that of the last one stands in the record.
    """
    records = [json.loads((folder / SAMPLES).read_text()) for folder in folders]
    together = {key: value for record in records for key, value in record.items()}
    runs = [run for record in records for run in record["runs"]]
    write({**together, "runs": runs}, directory)
    (directory / TABLES).mkdir()
    for name, table in tables(runs).items():
        (directory / TABLES / f"{name}.json").write_text(json.dumps(table))
    for folder in folders:
        shutil.copytree(folder / LOGS, directory / LOGS, dirs_exist_ok=True)  # names begin with the group
