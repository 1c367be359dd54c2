"""Write the files of a study's run: totals, the front as tables and charts, and the report."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from edgeopt.core.study_snapshot import StudySnapshot
from edgeopt.tracking import mlflow_fields, report
from edgeopt.tracking.charts import matplotlib
from edgeopt.tracking.charts.chart_data import prepare
from edgeopt.tracking.report import Course

FOLDER = "front"
"""Artifact folder of a study's run."""
TRIALS = f"{FOLDER}/trials.json"


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


def trials(snapshot: StudySnapshot) -> str:
    """Return all trials as one JSON document, as `edgeopt front --json` prints it."""
    return json.dumps(mlflow_fields.plain(snapshot.to_json()), allow_nan=False)


def write(folder: Path, snapshot: StudySnapshot, *, course: Course | None = None) -> None:
    """Write front.html (the report), front.png, front.csv (all trials) and trials.json into `folder`."""
    matplotlib.write(prepare(snapshot), folder / "front.png")
    report.write(folder / "front.html", snapshot, course=course or Course())
    (folder / Path(TRIALS).name).write_text(trials(snapshot))
    write_csv(folder / "front.csv", snapshot)


def write_csv(path: Path, snapshot: StudySnapshot) -> None:
    """Write one line per trial with its outcome, parameters, metrics and 95 % confidence intervals."""
    params = sorted({name for trial in snapshot.trials for name in trial.params})
    metrics = sorted({name for trial in snapshot.trials for name in trial.metrics})
    intervals = {name for trial in snapshot.trials for name in trial.intervals}
    columns = [f"params.{name}" for name in params]
    for name in metrics:
        columns.append(f"metrics.{name}")
        columns += [f"metrics.{name}.low", f"metrics.{name}.high"] if name in intervals else []
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["number", "outcome", "pareto_rank", "run_id", *columns])
        table.writeheader()
        for trial in snapshot.trials:
            ends = {f"metrics.{name}.low": low for name, (low, _) in trial.intervals.items()}
            ends |= {f"metrics.{name}.high": high for name, (_, high) in trial.intervals.items()}
            table.writerow(
                {
                    "number": trial.number,
                    "outcome": trial.outcome_text,
                    "pareto_rank": trial.pareto_rank,
                    "run_id": trial.run_id,
                    **{f"params.{name}": value for name, value in trial.params.items()},
                    **{f"metrics.{name}": value for name, value in trial.metrics.items()},
                    **ends,
                }
            )
