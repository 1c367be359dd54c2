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
"""Redrawing takes CPU time, which disturbs concurrent measurements."""
FILE_WIDTH = 100
"""Width in columns of output to a file or a pipe."""
_ERROR_CHARACTERS = 120


def console(stream: TextIO, *, stderr: bool) -> Console:
    """Return a console that is `FILE_WIDTH` columns wide if the stream is not a terminal and COLUMNS is not set."""
    width = None if stream.isatty() or "COLUMNS" in os.environ else FILE_WIDTH
    return Console(stderr=stderr, width=width, highlight=False, markup=False, soft_wrap=True)


err = console(sys.stderr, stderr=True)


@contextmanager
def step(title: str) -> Iterator[Callable[[str], None]]:
    """Show a spinner with the latest progress line, or plain lines if stderr is not a terminal."""
    if not err.is_terminal:
        yield lambda line: err.print(f"{title}: {line}")
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, refresh_per_second=REFRESHES_PER_S) as bar:
        task = bar.add_task(title)
        yield lambda line: bar.update(task, description=f"{title}: {_first_line(line)}")


class SweepWatcher:
    """Progress bar with the best objective value and the remaining time, and one line per ended trial."""

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
        """Show a progress line of the running trial."""
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
        """Show the current state of the study."""
        from edgeopt.search.status import collect_status
        from edgeopt.search.storage.trial import EVALUATED_STATES

        status = collect_status(self._study)
        left = "" if status.remaining_s is None else f"{status.remaining_s / 60:.0f} min left"
        done = sum(status.trials.get(state, 0) for state in EVALUATED_STATES)
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
    """Show a progress bar over the trials of a study; only the lines of trials if stderr is not a terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[best]}"),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=err, refresh_per_second=REFRESHES_PER_S, disable=not err.is_terminal) as bar:
        yield SweepWatcher(study, bar)


@contextmanager
def watch_workers(study: Study) -> Iterator[Callable[[], None]]:
    """Show the trials that other processes evaluate. The yielded function prints the newly ended trials."""
    from edgeopt.search.storage.trial import ENDED_STATES

    with watch_sweep(study) as watcher:
        shown = {trial.number for trial in study.trials() if trial.recorded}

        def refresh() -> None:
            for trial in study.trials():
                if not trial.recorded or trial.number in shown:
                    continue
                shown.add(trial.number)
                if trial.state == "failed" and trial.summary is not None:  # stored without a result if workers died
                    stage, _, cause = (trial.summary.failure or "").partition(": ")
                    watcher.message(_failed_line(trial, trial.summary.spent_s, stage, cause))
                elif trial.state in ENDED_STATES:
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
    """Return one line on an ended trial: parameters, duration, outcome and cause."""
    spent_s = sum(result.timings_s.values())
    if result.failure is not None:
        return _failed_line(trial, spent_s, result.failure.stage, result.failure.message)
    text = _trial_text(trial, spent_s)
    if result.refused:
        stopped = f"{OUTCOMES['stopped']} at {result.refused}"
        outcome = OUTCOMES["refused"] if result.refused == PREDICTION else stopped
        return Text.assemble(("⊘", "yellow"), f"{text}: {outcome}: {result.violated[0].message}")
    if result.feasible:
        return Text.assemble(("✓", "green"), f"{text}: {OUTCOMES['feasible']}")
    cause = next((verdict.message for verdict in result.verdicts if not verdict.satisfied), "nothing was measured")
    return Text.assemble(("·", "yellow"), f"{text}: {OUTCOMES['infeasible']}: {cause}")


def _failed_line(trial: Trial, spent_s: float, stage: str, cause: str) -> Text:
    shown = _first_line(cause)[:_ERROR_CHARACTERS]
    return Text.assemble(("✗", "red"), f"{_trial_text(trial, spent_s)}: {OUTCOMES['failed']} at {stage}: {shown}")


def _trial_text(trial: Trial, spent_s: float) -> str:
    return f" trial {trial.number} {label(trial.params)} ({spent_s:.0f} s)"


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else ""
