"""What people read in a terminal: progress on stderr, tables on stdout."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from edgeopt import units

if TYPE_CHECKING:
    from edgeopt.result import TrialResult
    from edgeopt.search.study import Study

Document = Mapping[str, Any]

REFRESHES_PER_S = 2
"""Redrawing costs processor time that a measurement beside it would notice."""

FILE_WIDTH = 140
"""Columns of a table that goes into a file or a pipe."""


def _console(stream: TextIO, *, stderr: bool) -> Console:
    width = None if stream.isatty() or "COLUMNS" in os.environ else FILE_WIDTH
    return Console(stderr=stderr, width=width, highlight=False, markup=False, soft_wrap=True)


err = _console(sys.stderr, stderr=True)
out = _console(sys.stdout, stderr=False)


@contextmanager
def progress(title: str) -> Iterator[Callable[[str], None]]:
    """A spinner with what is being done; plain lines where stderr is no terminal."""
    if not err.is_terminal:
        yield lambda line: err.print(f"{title}: {line}")
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, refresh_per_second=REFRESHES_PER_S) as bar:
        task = bar.add_task(title)
        yield lambda line: bar.update(task, description=f"{title}: {line.splitlines()[0] if line else ''}")


class SweepWatcher:
    """Trials done, the best so far and the time left."""

    def __init__(self, study: Study, bar: Progress) -> None:
        self._study, self._bar = study, bar
        self._started = time.monotonic()
        self._done_before = len(study.finished())
        self._done = self._done_before
        self._task = bar.add_task("starting", total=study.search.trials, completed=self._done, left="", best="")
        self._number = -1

    def started(self, number: int, params: Mapping[str, Any]) -> None:
        self._number = number
        self._bar.update(self._task, description=f"trial {number}")

    def progress(self, line: str) -> None:
        text = line.splitlines()[0] if line else ""
        self._bar.update(self._task, description=f"trial {self._number}: {text}"[:60])

    def finished(self, number: int, result: TrialResult) -> None:
        self._done += 1
        passed = time.monotonic() - self._started
        left = passed / (self._done - self._done_before) * max(0, self._study.search.trials - self._done)
        self._bar.update(self._task, completed=self._done, left=f"{left / 60:.0f} min left", best=self._best())
        self._bar.console.print(_trial_line(number, result))

    def _best(self) -> str:
        objective = self._study.objectives[0]
        values = [r.metrics[objective.metric] for r in self._study.finished().values() if r.feasible]
        if not values:
            return "nothing feasible yet"
        best = min(values, key=lambda v: objective.sign * v)
        return f"best {objective.metric} {best:.4g}"


@contextmanager
def sweep(study: Study) -> Iterator[SweepWatcher]:
    """A bar over the trials of a study, and a line for each that ends."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[best]}"),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=err, refresh_per_second=REFRESHES_PER_S, disable=False) as bar:
        yield SweepWatcher(study, bar)


def run(document: Document) -> None:
    if _config(document):
        return
    _measurements(document["measurements"])
    _verdicts(document["verdicts"])
    for note in document["notes"]:
        out.print(f"note: {note}")
    if document["engine"]:
        out.print(f"engine: {document['engine']['directory']}")
    out.print(f"MLflow run: {document['run_id']}")


def sweep_result(document: Document) -> None:
    if _config(document):
        return
    front(document)
    if "promotion" in document:
        promote(document["promotion"])
    hint = document.get("mlflow")
    if hint:
        if hint["command"]:
            out.print(f"see it: {hint['command']}")
        out.print(f"        {hint['url']}")


def front(document: Document) -> None:
    names = [o["metric"] for o in document["objectives"]]
    unit_of = {o["metric"]: o["unit"] for o in document["objectives"]}
    table = Table(
        title=f"study {document['study']}: {len(document['trials'])} trials, front of {len(document['front'])}"
    )
    table.add_column("trial", justify="right")
    table.add_column("recipe", overflow="fold")
    for name in names:
        table.add_column(name.replace("/", "/\n"), justify="right")
    table.add_column("limits")
    ordered = sorted(document["trials"], key=lambda t: (t["pareto_rank"] or 10**6, t["number"]))
    for trial in ordered:
        figures = [units.show(trial["metrics"][n], unit_of[n]) if n in trial["metrics"] else "–" for n in names]
        style = "bold green" if trial["pareto_rank"] == 1 else "" if trial["feasible"] else "dim"
        table.add_row(str(trial["number"]), _params(trial["params"]), *figures, _state(trial), style=style)
    out.print(table)
    for limit in document["limits"]:
        out.print(f"limit: {limit['metric']} {limit['limit']}")
    if document["champion"]:
        champion = document["champion"]
        out.print(f"champion: models:/{champion['name']}@champion (version {champion['version']})")


def promote(document: Document) -> None:
    for release in document["releases"]:
        names = [alias for alias, version in document["aliases"].items() if version == release["version"]]
        told = "registered" if release["created"] else "was registered before"
        also = f", alias {', '.join(names)}" if names else ""
        out.print(f"{document['model']} version {release['version']}: trial {release['number']} {told}{also}")


def estimate(document: Document) -> None:
    table = Table(title=f"{document['recipe']} on {document['target']} ({document['method']})")
    table.add_column("part")
    table.add_column("MiB", justify="right")
    for name in ("weights", "tables", "tokenizer", "disk_bytes", "unpacked", "kv_cache", "activations", "peak_bytes"):
        table.add_row(name.replace("_bytes", ""), f"{document[name] / 2**20:.2f}")
    out.print(table)
    out.print(f"{document['parameters']:,} parameters, tier {document['tier']}")
    for verdict in document["limits"]:
        told = "fits" if verdict["fits"] else "does not fit"
        out.print(f"{verdict['metric']} {verdict['predicted']:.1f} MiB, {verdict['limit']}: {told}")
    out.print(f"next lever: {document['next_lever']}")


def profile(document: Document) -> None:
    if document["written"]:
        out.print(f"written: {document['written']}; use it by target={document['name']}")
    else:
        print(document["yaml"], end="")


def bench(document: Document) -> None:
    _measurements(document["measurements"])


def generate(document: Document) -> None:
    print(document["prompt"] + document["completion"])


def doctor(document: Document) -> None:
    table = Table(title="what this machine can do")
    for column in ("", "what", "found", "mend"):
        table.add_column(column, overflow="fold")
    for check in document["checks"]:
        good = Text("yes", style="green") if check["good"] else Text("no", style="yellow")
        table.add_row(good, check["what"], check["found"], "" if check["good"] else check["mend"])
    out.print(table)


def _config(document: Document) -> bool:
    """Print a composed config, where that is all that was asked for."""
    if set(document) != {"config"}:
        return False
    import yaml

    print(yaml.safe_dump(document["config"], sort_keys=False, allow_unicode=True), end="")
    return True


def _measurements(measurements: list[Document]) -> None:
    if not measurements:
        return
    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_column("n", justify="right")
    table.add_column("method", overflow="fold")
    for m in measurements:
        interval = "" if m["low"] == m["high"] else f"{m['low']:.4g} … {m['high']:.4g}"
        marks = ("" if m["kind"] == "measured" else "estimated: ") + ("noisy: " if m["noisy"] else "")
        table.add_row(m["metric"], units.show(m["value"], m["unit"]), interval, str(m["count"]), marks + m["method"])
    out.print(table)


def _verdicts(verdicts: list[Document]) -> None:
    for v in verdicts:
        told = ("kept", "green") if v["kept"] else (f"not kept: {v['reason']}", "red")
        out.print(Text.assemble(f"{v['metric']} {v['limit']}: ", told))


def _params(params: Document) -> str:
    recipe = [str(params["recipe"])] if "recipe" in params else []
    return " ".join([*recipe, *(f"{k.rpartition('.')[2]}={v}" for k, v in params.items() if k != "recipe")])


def _state(trial: Document) -> str:
    if trial["failure"]:
        return f"failed: {trial['failure']}"[:80]
    if trial["feasible"]:
        return "kept"
    broken = [metric for metric, excess in trial["excess"].items() if excess is None or excess > 0]
    return f"breaks {', '.join(broken)}" if broken else trial["state"]


def _trial_line(number: int, result: TrialResult) -> Text:
    seconds = sum(result.timings_s.values())
    if result.failure is not None:
        why = result.failure.message.splitlines()[0][:120]
        return Text.assemble(("✗", "red"), f" trial {number} failed in {result.failure.stage}: {why}")
    mark = ("✓", "green") if result.feasible else ("·", "yellow")
    return Text.assemble(mark, f" trial {number} {result.recipe['text']} ({seconds:.0f} s)")
