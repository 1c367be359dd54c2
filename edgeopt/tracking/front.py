"""What is kept of a finished study: totals, the front as tables and as pictures."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeopt.tracking import mlflow_fields, report
from edgeopt.tracking.charts import matplotlib
from edgeopt.tracking.charts.chart_data import prepare
from edgeopt.tracking.report import Course

Rows = Sequence[Mapping[str, Any]]
FOLDER = "front"
"""Where the files of a study's run lie."""
TRIALS = f"{FOLDER}/trials.json"


def totals(rows: Rows, objectives: Rows) -> dict[str, float]:
    """Counts of trials and the best value of each objective among those that keep every limit."""
    feasible = [row for row in rows if row["feasible"]]
    found = {
        "trials": float(len(rows)),
        "trials_feasible": float(len(feasible)),
        "trials_refused": float(sum(1 for row in rows if row["state"] == "refused")),
        "trials_failed": float(sum(1 for row in rows if row["failure"])),
        "front_size": float(sum(1 for row in feasible if row["pareto_rank"] == 1)),
    }
    for objective in objectives:
        values = [row["metrics"][objective["metric"]] for row in feasible if objective["metric"] in row["metrics"]]
        if values:
            found[f"best/{objective['metric']}"] = min(values) if objective["direction"] == "minimize" else max(values)
    return found


def trials(study: str, rows: Rows, objectives: Rows, limits: Rows) -> str:
    """All trials as one JSON document, as `edgeopt front --json` gives it."""
    document = {"study": study, "objectives": objectives, "limits": limits, "trials": rows}
    return json.dumps(mlflow_fields.plain(document), allow_nan=False)


def write(
    folder: Path, *, study: str, rows: Rows, objectives: Rows, limits: Rows, course: Course | None = None
) -> None:
    """Write front.html (the report), front.png, front.csv (the front alone) and trials.json into `folder`."""
    view = prepare(study=study, rows=rows, objectives=objectives, limits=limits)
    matplotlib.write(view, folder / "front.png")
    report.write(
        folder / "front.html",
        study=study,
        rows=rows,
        objectives=objectives,
        limits=limits,
        course=course or Course(),
    )
    (folder / Path(TRIALS).name).write_text(trials(study, rows, objectives, limits))
    front = [row for row in rows if row["feasible"] and row["pareto_rank"] == 1]
    columns = sorted({f"params.{k}" for row in front for k in row["params"]})
    columns += sorted({f"metrics.{k}" for row in front for k in row["metrics"]})
    with (folder / "front.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["number", "run_id", *columns])
        table.writeheader()
        for row in front:
            cells = {f"{group}.{k}": v for group in ("params", "metrics") for k, v in row[group].items()}
            table.writerow({"number": row["number"], "run_id": row["run_id"], **cells})
