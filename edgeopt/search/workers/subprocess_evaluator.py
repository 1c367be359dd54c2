"""Evaluates trials in a process of its own, so that a crash or a time-out ends a trial and not the sweep."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from edgeopt.core.result import Failure, TrialResult

Evaluate = Callable[[Mapping[str, Any], Callable[[str], None]], TrialResult]
"""Parameters and a progress callback to a result; importable by name, since another process calls it."""

PR_SET_PDEATHSIG = 1


class Evaluator:
    """One long-lived process that evaluates trials one after another; it is started again when it died.

    Args:
        prepare: done in the process as soon as it starts.
    """

    def __init__(self, evaluate: Evaluate, *, timeout_s: float, prepare: Callable[[], None] | None = None) -> None:
        self._evaluate, self._timeout_s, self._prepare = evaluate, timeout_s, prepare
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def run(self, params: Mapping[str, Any], progress: Callable[[str], None]) -> TrialResult | Failure:
        """The result of one trial, or how its process ended without one."""
        pipe = self.start()
        deadline = time.monotonic() + self._timeout_s
        stage = "start"
        with contextlib.suppress(BrokenPipeError):  # it died while nothing was asked of it: `recv` finds out
            pipe.send(dict(params))
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not pipe.poll(min(left, 1.0)):
                if left > 0:
                    continue
                self.close()
                return Failure(stage=stage, kind="Timeout", message=f"the trial took longer than {self._timeout_s:g} s")
            try:
                kind, content = pipe.recv()
            except (EOFError, ConnectionResetError):  # reset: it died before it had read the parameters
                return Failure(stage=stage, kind="Crash", message=self._last_words())
            if kind == "result":
                return TrialResult.from_json(content)
            stage = content.splitlines()[0] if content else stage
            progress(content)

    def start(self) -> Connection:
        """Start the process where none is alive, and do not wait for it; where its trials go in."""
        if self._process is None or self._pipe is None or not self._process.is_alive():
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self._evaluate, self._prepare), daemon=False)
            self._process.start()
            theirs.close()
        return self._pipe

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process, self._pipe = None, None

    def _last_words(self) -> str:
        assert self._process is not None
        self._process.join()
        code = self._process.exitcode or 0
        self._process, self._pipe = None, None
        if code == -signal.SIGKILL:
            return "the trial's process was killed (SIGKILL), which usually means that memory ran out"
        if code < 0:
            return f"the trial's process ended by {signal.Signals(-code).name}"
        return f"the trial's process ended with exit code {code}"


def _serve(pipe: Connection, evaluate: Evaluate, prepare: Callable[[], None] | None) -> None:
    """Answer trials until the pipe closes; die with the parent, and leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if prepare is not None:
        prepare()
    while True:
        try:
            params = pipe.recv()
        except EOFError:
            return
        result = evaluate(params, lambda line: pipe.send(("progress", line)))
        pipe.send(("result", result.to_json()))
