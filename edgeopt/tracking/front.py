"""Write the files of a study's run: totals, the front as tables and charts, and the report."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from edgeopt.core import units
from edgeopt.core.metric_text import readable
from edgeopt.core.recipe import label
from edgeopt.core.study_snapshot import StudySnapshot, TrialSnapshot
from edgeopt.tracking import mlflow_fields, report
from edgeopt.tracking.charts import matplotlib
from edgeopt.tracking.charts.chart_data import BASELINE_LABEL, build_chart_data
from edgeopt.tracking.report import SearchStatistics

FOLDER = "front"
"""Artifact folder of a study's run."""
TRIALS_FILE = f"{FOLDER}/trials.json"


def totals(snapshot: StudySnapshot) -> dict[str, float]:
    """Return the counts of trials and the best value of each objective among feasible trials."""
    values = {
        "trials": float(len(snapshot.trials)),
        "trials_feasible": float(len(snapshot.feasible)),
        "trials_refused": float(sum(1 for trial in snapshot.trials if trial.state == "refused")),
        "trials_failed": float(sum(1 for trial in snapshot.trials if trial.failure)),
        "front_size": float(len(snapshot.front)),
    }
    for objective in snapshot.objectives:
        metric = objective.metric
        measured = [trial.metrics[metric] for trial in snapshot.feasible if metric in trial.metrics]
        if measured:
            values[f"best/{metric}"] = min(measured) if objective.direction == "minimize" else max(measured)
    return values


def trials_json(snapshot: StudySnapshot) -> str:
    """Return all trials as one JSON document, as `edgeopt front --json` prints it."""
    return json.dumps(mlflow_fields.to_json_types(snapshot.to_json()), allow_nan=False)


def write(folder: Path, snapshot: StudySnapshot, *, statistics: SearchStatistics | None = None) -> None:
    """Write the files of the artifact folder `front`.

    These are front.html (the report), front.png (the chart), front.pdf (chart and trials), front.csv (all trials) and
    trials.json (the snapshot).
    """
    data = build_chart_data(snapshot)
    matplotlib.write_png(data, folder / "front.png")
    matplotlib.write_pdf(data, *trial_rows(snapshot), folder / "front.pdf")
    report.write(folder / "front.html", snapshot, statistics=statistics or SearchStatistics())
    (folder / Path(TRIALS_FILE).name).write_text(trials_json(snapshot))
    write_csv(folder / "front.csv", snapshot)


def trial_rows(snapshot: StudySnapshot) -> tuple[list[str], list[list[str]]]:
    """Return headers and rows of a table for people: the original model, then all trials, those of the front first."""
    objectives = snapshot.objectives
    headers = ["trial", "outcome", *(readable(objective.metric) for objective in objectives), "recipe"]
    rows = []
    if snapshot.baseline:
        values = [snapshot.baseline.get(objective.metric) for objective in objectives]
        rows.append(["–", BASELINE_LABEL, *map(_show, values, (o.unit for o in objectives)), ""])
    for trial in sorted(snapshot.trials, key=report.display_order):
        values = [trial.metrics.get(objective.metric) for objective in objectives]
        cells = map(_show, values, (objective.unit for objective in objectives))
        rows.append([str(trial.number), trial.outcome_text, *cells, label(trial.params)])
    return headers, rows


def _show(value: float | None, unit: str) -> str:
    return "–" if value is None else units.format_quantity(value, unit)


def write_csv(path: Path, snapshot: StudySnapshot) -> None:
    """Write one line per trial with its outcome, parameters, metrics and 95 % confidence intervals."""
    params = sorted({name for trial in snapshot.trials for name in trial.params})
    metrics = sorted({name for trial in snapshot.trials for name in trial.metrics})
    with_interval = {name for trial in snapshot.trials for name in trial.intervals}
    columns = [f"params.{name}" for name in params]
    for name in metrics:
        columns.append(f"metrics.{name}")
        columns += [f"metrics.{name}.low", f"metrics.{name}.high"] if name in with_interval else []
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["number", "outcome", "pareto_rank", "run_id", *columns])
        table.writeheader()
        table.writerows(_csv_row(trial) for trial in snapshot.trials)


def _csv_row(trial: TrialSnapshot) -> dict[str, object]:
    row: dict[str, object] = {
        "number": trial.number,
        "outcome": trial.outcome_text,
        "pareto_rank": trial.pareto_rank,
        "run_id": trial.run_id,
    }
    row |= {f"params.{name}": value for name, value in trial.params.items()}
    row |= {f"metrics.{name}": value for name, value in trial.metrics.items()}
    for name, (low, high) in trial.intervals.items():
        row |= {f"metrics.{name}.low": low, f"metrics.{name}.high": high}
    return row
