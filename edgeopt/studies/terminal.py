"""Report a study's progress on stderr, for the command line and for `progress=True` in the Python API."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from edgeopt.core.recipe import label
from edgeopt.core.result import PREDICTION
from edgeopt.core.study_snapshot import OUTCOMES

if TYPE_CHECKING:
    from edgeopt.core.result import TrialResult
    from edgeopt.search.storage.trial import Trial
    from edgeopt.search.study import Study

REFRESHES_PER_S = 2
"""Redrawing costs processor time that a measurement next to it would notice."""
FILE_WIDTH = 100
"""Columns of a table that goes into a file or a pipe."""
_ERROR_CHARACTERS = 120


def console(stream: TextIO, *, stderr: bool) -> Console:
    """Return a console that keeps to `FILE_WIDTH` columns if the stream is not a terminal."""
    width = None if stream.isatty() or "COLUMNS" in os.environ else FILE_WIDTH
    return Console(stderr=stderr, width=width, highlight=False, markup=False, soft_wrap=True)


err = console(sys.stderr, stderr=True)


@contextmanager
def step(title: str) -> Iterator[Callable[[str], None]]:
    """Show a spinner with what is being done, or plain lines if stderr is not a terminal."""
    if not err.is_terminal:
        yield lambda line: err.print(f"{title}: {line}")
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, refresh_per_second=REFRESHES_PER_S) as bar:
        task = bar.add_task(title)
        yield lambda line: bar.update(task, description=f"{title}: {_first_line(line)}")


class SweepWatcher:
    """Shows the number of finished trials, the best one so far and the remaining time, and a line per trial."""

    def __init__(self, study: Study, bar: Progress) -> None:
        self._study, self._bar = study, bar
        self._task = bar.add_task("starting", total=study.search.trials, left="", best="")
        self._number = -1
        self.refresh()

    def started(self, trial: Trial) -> None:
        """Show that a trial has started."""
        self._number = trial.number
        self._bar.update(self._task, description=f"trial {trial.number}")

    def progress(self, line: str) -> None:
        """Show what the running trial does."""
        text = f"trial {self._number}: {_first_line(line)}" if self._number >= 0 else _first_line(line)
        self._bar.update(self._task, description=text)

    def finished(self, trial: Trial, result: TrialResult) -> None:
        """Print the line of a trial that has ended."""
        self.message(trial_line(trial, result))
        self.refresh()

    def message(self, line: str | Text) -> None:
        """Print a line above the progress bar."""
        self._bar.console.print(line)

    def refresh(self) -> None:
        """Show the state of the study, whichever process changed it."""
        from edgeopt.search.status import collect_status

        known = collect_status(self._study)
        left = "" if known["left_s"] is None else f"{known['left_s'] / 60:.0f} min left"
        done = sum(known["trials"].get(state, 0) for state in ("finished", "stopped", "failed"))
        self._bar.update(self._task, completed=done, left=left, best=self._best())

    def _best(self) -> str:
        objective = self._study.objectives[0]
        feasible = [t.summary.metrics for t in self._study.trials() if t.summary is not None and t.summary.feasible]
        values = [metrics[objective.metric] for metrics in feasible if objective.metric in metrics]
        if not values:
            return "nothing feasible yet"
        best = min(values, key=lambda value: objective.sign * value)
        return f"best {objective.metric} {best:.3g}"


@contextmanager
def watch_sweep(study: Study) -> Iterator[SweepWatcher]:
    """Show a progress bar over the trials of a study."""
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
def watch_workers(study: Study) -> Iterator[Callable[[], None]]:
    """Show the trials that other processes evaluate; the yielded function prints those that have ended since."""
    with watch_sweep(study) as watcher:
        shown = {trial.number for trial in study.trials() if trial.recorded}

        def refresh() -> None:
            for trial in study.trials():
                if trial.recorded and trial.number not in shown:
                    shown.add(trial.number)
                    if trial.state in ("finished", "stopped", "refused"):
                        watcher.finished(trial, study.load_result(trial.number))
            watcher.progress(f"{len(study.storage.active_workers())} workers")
            watcher.refresh()

        yield refresh


class TerminalReporter:
    """Report a study on stderr."""

    def message(self, line: str) -> None:
        """Print one line."""
        err.print(line)

    def step(self, title: str) -> AbstractContextManager[Callable[[str], None]]:
        """Show that the step `title` runs."""
        return step(title)

    def sweep(self, study: Study) -> AbstractContextManager[SweepWatcher]:
        """Show the trials that this process evaluates."""
        return watch_sweep(study)

    def workers(self, study: Study) -> AbstractContextManager[Callable[[], None]]:
        """Show the trials that other processes evaluate."""
        return watch_workers(study)


def trial_line(trial: Trial, result: TrialResult) -> Text:
    """Return one line on a trial that has ended: its parameters, its duration and its outcome with the cause."""
    text = f" trial {trial.number} {label(trial.params)} ({sum(result.timings_s.values()):.0f} s)"
    if result.failure is not None:
        cause = _first_line(result.failure.message)[:_ERROR_CHARACTERS]
        return Text.assemble(("✗", "red"), f"{text}: {OUTCOMES['failed']} at {result.failure.stage}: {cause}")
    if result.refused:
        stopped = f"{OUTCOMES['stopped']} at {result.refused}"
        outcome = OUTCOMES["refused"] if result.refused == PREDICTION else stopped
        return Text.assemble(("⊘", "yellow"), f"{text}: {outcome}: {result.violated[0].message}")
    if result.feasible:
        return Text.assemble(("✓", "green"), f"{text}: {OUTCOMES['feasible']}")
    cause = next((verdict.message for verdict in result.verdicts if not verdict.satisfied), "nothing was measured")
    return Text.assemble(("·", "yellow"), f"{text}: {OUTCOMES['infeasible']}: {cause}")


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else ""
