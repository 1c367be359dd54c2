"""Evaluate trials in a subprocess, so that a crash or a timeout ends one trial and not the sweep."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from edgeopt.core.result import Failure, TrialResult

EvaluateFunction = Callable[[Mapping[str, Any], Callable[[str], None]], TrialResult]
"""Function of parameters and a progress callback that returns a result. The subprocess imports it by name."""

PR_SET_PDEATHSIG = 1
"""Option of prctl(2) for the signal that a process gets when its parent dies."""


class SubprocessEvaluator:
    """Subprocess that evaluates one trial after another and is restarted when it dies.

    Args:
        evaluate: evaluates a trial in the subprocess.
        timeout_s: seconds after which a trial is ended.
        prepare: runs once in each subprocess before its first trial.
    """

    def __init__(
        self, evaluate: EvaluateFunction, *, timeout_s: float, prepare: Callable[[], None] | None = None
    ) -> None:
        self._evaluate, self._timeout_s, self._prepare = evaluate, timeout_s, prepare
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def run(self, params: Mapping[str, Any], progress: Callable[[str], None]) -> TrialResult | Failure:
        """Return the result of a trial, or a Failure if it times out or its process dies.

        Args:
            params: parameters of the trial.
            progress: receives the progress lines of the evaluation.
        """
        pipe = self.start()
        deadline = time.monotonic() + self._timeout_s
        stage = "start"
        with contextlib.suppress(BrokenPipeError):  # the process died while idle: `recv` reports it
            pipe.send(dict(params))
        while True:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0 or not pipe.poll(min(remaining_s, 1.0)):
                if remaining_s > 0:
                    continue
                self.close()
                return Failure(stage=stage, kind="Timeout", message=f"the trial took longer than {self._timeout_s:g} s")
            try:
                kind, content = pipe.recv()
            except (EOFError, ConnectionResetError):  # reset: the process died before it read the parameters
                return Failure(stage=stage, kind="Crash", message=self._exit_message())
            if kind == "result":
                return TrialResult.from_json(content)
            stage = content.splitlines()[0] if content else stage
            progress(content)

    def start(self) -> Connection:
        """Start the process if it does not run, without waiting for it, and return the pipe to it."""
        if self._process is None or self._pipe is None or not self._process.is_alive():
            context = multiprocessing.get_context("spawn")
            self._pipe, child_pipe = context.Pipe()
            self._process = context.Process(
                target=_serve, args=(child_pipe, self._evaluate, self._prepare), daemon=False
            )
            with _without_main_module():
                self._process.start()
            child_pipe.close()
        return self._pipe

    def close(self) -> None:
        """Kill the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process, self._pipe = None, None

    def _exit_message(self) -> str:
        """Wait for the end of the process and return a message with its exit code or signal."""
        assert self._process is not None
        self._process.join()
        code = self._process.exitcode or 0
        self._process, self._pipe = None, None
        if code == -signal.SIGKILL:
            return "the trial process was killed (SIGKILL), most likely because memory ran out"
        if code < 0:
            return f"the trial process was ended by {signal.Signals(-code).name}"
        return f"the trial process ended with exit code {code}"


@contextlib.contextmanager
def _without_main_module() -> Iterator[None]:
    """Keep a process that starts inside the block from importing the user's script again.

    `multiprocessing` imports the main module of its parent in every spawned process. A script that calls
    `edgeopt.sweep` without `if __name__ == "__main__"` would sweep again in
    each of them. Nothing here needs that module.
    """
    main = sys.modules["__main__"]
    hidden: dict[str, Any] = {name: vars(main)[name] for name in ("__file__", "__spec__") if name in vars(main)}
    vars(main).update({"__spec__": None})
    vars(main).pop("__file__", None)
    try:
        yield
    finally:
        vars(main).update(hidden)


def _serve(pipe: Connection, evaluate: EvaluateFunction, prepare: Callable[[], None] | None) -> None:
    """Evaluate trials until the pipe closes or the parent dies. The parent handles Ctrl-C."""
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
