"""What people read in a terminal: progress on stderr, tables on stdout."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from edgeopt.core import units
from edgeopt.core.recipe import label

if TYPE_CHECKING:
    from edgeopt.core.result import TrialResult
    from edgeopt.search.storage.trial import Row
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
        self._task = bar.add_task("starting", total=study.search.trials, left="", best="")
        self._number = -1
        self.refresh()

    def started(self, row: Row) -> None:
        self._number = row.number
        self._bar.update(self._task, description=f"trial {row.number}")

    def progress(self, line: str) -> None:
        text = line.splitlines()[0] if line else ""
        self._bar.update(self._task, description=f"trial {self._number}: {text}"[:60])

    def finished(self, row: Row, result: TrialResult) -> None:
        self.told(_trial_line(row, result))
        self.refresh()

    def told(self, line: str | Text) -> None:
        self._bar.console.print(line)

    def refresh(self) -> None:
        """Show where the study stands, whoever brought it there."""
        from edgeopt.search.status import status

        known = status(self._study)
        left = "" if known["left_s"] is None else f"{known['left_s'] / 60:.0f} min left"
        done = sum(known["trials"].get(state, 0) for state in ("finished", "stopped", "failed"))
        self._bar.update(self._task, completed=done, left=left, best=self._best())

    def _best(self) -> str:
        objective = self._study.objectives[0]
        found = [row.summary.metrics for row in self._study.rows() if row.summary is not None and row.summary.feasible]
        values = [metrics[objective.metric] for metrics in found if objective.metric in metrics]
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


@contextmanager
def team(study: Study) -> Iterator[Callable[[], None]]:
    """The same for trials that other processes evaluate: what it yields shows those that have ended since."""
    with sweep(study) as watcher:
        shown = {row.number for row in study.rows() if row.recorded}

        def refresh() -> None:
            for row in study.rows():
                if row.recorded and row.number not in shown:
                    shown.add(row.number)
                    if row.state in ("finished", "stopped", "refused"):
                        watcher.finished(row, study.result(row.number))
            watcher.progress(f"{len(study.ledger.members())} workers")
            watcher.refresh()

        yield refresh


def status(document: Document) -> None:
    """`edgeopt status` for people."""
    trials = ", ".join(f"{count} {state}" for state, count in document["trials"].items()) or "none yet"
    out.print(f"study {document['study']}: {document['over'] or 'goes on'}")
    out.print(f"trials: {trials}; budget {document['budget']}; {document['attempts_lost']} attempts were lost")
    if document["unrecorded"]:
        out.print(f"{document['unrecorded']} are over and not in MLflow yet")
    out.print(f"{document['feasible']} keep every limit, {document['front']} on the front")
    for title, key in (("stopped at", "rungs"), ("broken limits", "broken_limits")):
        if document[key]:
            out.print(f"{title}: " + ", ".join(f"{name} {count}" for name, count in document[key].items()))
    saved = ", ".join(f"{by} {seconds / 60:.1f}" for by, seconds in document["saved_s"].items())
    out.print(f"spent: {document['spent_s'] / 60:.1f} min; saved, in min: {saved}")
    if document["spent_j"]:
        out.print(f"energy: {document['spent_j'] / 3600:.3g} Wh")
    out.print(f"hypervolume: {document['hypervolume']:.4f} {_sparkline(document['hypervolumes'])}")
    if document["left_s"] is not None:
        out.print(f"estimated to take {document['left_s'] / 60:.0f} min more")
    for worker in document["workers"]:
        doing = "idle" if worker["trial"] is None else f"trial {worker['trial']}"
        out.print(f"worker {worker['worker']} ({worker['role']}): {doing}")


def _sparkline(values: Sequence[float], width: int = 40) -> str:
    """Values as a row of bars, at most `width` of them."""
    bars = "▁▂▃▄▅▆▇█"
    shown = values[:: max(1, -(-len(values) // width))]
    top = max(shown, default=0.0) or 1.0
    return "".join(bars[min(len(bars) - 1, int(len(bars) * value / top))] for value in shown)


def config(document: Document) -> bool:
    """Print a composed config, where that is all that was asked for."""
    if set(document) != {"config"}:
        return False
    import yaml

    print(yaml.safe_dump(document["config"], sort_keys=False, allow_unicode=True), end="")
    return True


def measurements(found: list[Document]) -> None:
    if not found:
        return
    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_column("n", justify="right")
    table.add_column("method", overflow="fold")
    for m in found:
        interval = "" if m["low"] == m["high"] else f"{m['low']:.4g} … {m['high']:.4g}"
        marks = ("" if m["kind"] == "measured" else "estimated: ") + ("noisy: " if m["noisy"] else "")
        table.add_row(m["metric"], units.show(m["value"], m["unit"]), interval, str(m["count"]), marks + m["method"])
    out.print(table)


def verdicts(found: list[Document]) -> None:
    for v in found:
        told = ("kept", "green") if v["kept"] else (f"not kept: {v['reason']}", "red")
        if v["kept"] and v["predicted"]:
            told = ("not measured, and not excluded by what was predicted", "yellow")
        out.print(Text.assemble(f"{v['metric']} {v['limit']}: ", told))


def gates(found: list[Document]) -> None:
    """What gates or checks said, a line each."""
    for verdict in found:
        out.print(
            Text.assemble(
                ("  passed  " if verdict["passed"] else "  REFUSED ", "green" if verdict["passed"] else "red"),
                f"{verdict['gate']}: {verdict['evidence']}",
            )
        )


def _trial_line(row: Row, result: TrialResult) -> Text:
    """How a trial ended: what the search chose for it, how long it took, and the first limit that it does not keep."""
    trial = f" trial {row.number}"
    if result.failure is not None:
        why = result.failure.message.splitlines()[0][:120]
        return Text.assemble(("✗", "red"), f"{trial} failed in {result.failure.stage}: {why}")
    if result.refused:
        return Text.assemble(("⊘", "yellow"), f"{trial} refused at {result.refused}: {result.violated[0].message}")
    trial += f" {label(row.params)} ({sum(result.timings_s.values()):.0f} s)"
    if result.feasible:
        return Text.assemble(("✓", "green"), trial)
    why = next((verdict.message for verdict in result.verdicts if not verdict.satisfied), "nothing was measured")
    return Text.assemble(("·", "yellow"), f"{trial}: {why}")


class TerminalReporter:
    """Report a study on stderr."""

    def message(self, line: str) -> None:
        err.print(line)

    def step(self, title: str) -> AbstractContextManager[Callable[[str], None]]:
        return progress(title)

    def sweep(self, study: Study) -> AbstractContextManager[SweepWatcher]:
        return sweep(study)

    def workers(self, study: Study) -> AbstractContextManager[Callable[[], None]]:
        return team(study)


REPORTER = TerminalReporter()
