"""Define how a study reports its progress, so that no library module depends on the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

from edgeopt.core.protocols import Progress

if TYPE_CHECKING:
    from edgeopt.core.result import TrialResult
    from edgeopt.search.storage.trial import Trial
    from edgeopt.search.study import Study
    from edgeopt.search.workers.loop import Watcher


class Reporter(Protocol):
    """Show the progress of a study. The command line prints it; the Python API is silent by default."""

    def message(self, line: str) -> None:
        """Show one line."""
        ...

    def step(self, title: str) -> AbstractContextManager[Progress]:
        """Show that the step `title` runs. The yielded function shows a progress line."""
        ...

    def sweep(self, study: Study) -> AbstractContextManager[Watcher]:
        """Show the trials that this process evaluates."""
        ...

    def workers(self, study: Study) -> AbstractContextManager[Callable[[], None]]:
        """Show the trials that other processes evaluate. The yielded function refreshes the display."""
        ...


class _SilentWatcher:
    def started(self, trial: Trial) -> None: ...

    def progress(self, line: str) -> None: ...

    def finished(self, trial: Trial, result: TrialResult) -> None: ...

    def message(self, line: str) -> None: ...


class SilentReporter:
    """Report nothing."""

    def message(self, line: str) -> None: ...

    @contextmanager
    def step(self, title: str) -> Iterator[Progress]:
        yield lambda line: None

    @contextmanager
    def sweep(self, study: Study) -> Iterator[Watcher]:
        yield _SilentWatcher()

    @contextmanager
    def workers(self, study: Study) -> Iterator[Callable[[], None]]:
        yield lambda: None
