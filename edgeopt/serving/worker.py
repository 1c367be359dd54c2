"""One thread that generates, and the requests that wait for it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from edgeopt.errors import EdgeoptError
from edgeopt.serving.detokenizer import Decoding

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from edgeopt.core.protocols import Session

Reason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Text that came next, after `tokens` new tokens in all; `reason` is set on the last."""

    text: str
    tokens: int
    reason: Reason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be generated.

    Attributes:
        prompt: token ids.
        send: is called in the generating thread with each piece, or with the error that ended it; must not block.
        cancelled: set by whoever does not want the rest.
    """

    prompt: list[int]
    max_new_tokens: int
    stops: tuple[str, ...]
    adapter: str | None
    send: Callable[[Piece | EdgeoptError], None]
    cancelled: threading.Event = field(default_factory=threading.Event)


class FullError(Exception):
    """No more requests may wait."""


class Worker:
    """Generates for one job after another, in the order in which they came."""

    def __init__(self, session: Session, tokenizer: Tokenizer, *, waiting: int) -> None:
        self._session, self._tokenizer = session, tokenizer
        self._jobs: queue.Queue[Job | None] = queue.Queue(maxsize=waiting)
        self.tokens = 0
        """Generated since the start."""
        self._thread = threading.Thread(target=self._work, name="generating", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return self._jobs.qsize()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Let a job wait for its turn. Raises FullError where too many wait already."""
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise FullError from None

    def close(self) -> None:
        """End after the jobs that wait, and release the session."""
        self._jobs.put(None)
        self._thread.join()
        self._session.close()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if job.cancelled.is_set():
                continue
            try:
                self._generate(job)
            except EdgeoptError as error:
                job.send(error)
            except Exception as error:  # the thread serves the next request
                job.send(EdgeoptError(f"generation failed ({type(error).__name__}: {error})"))

    def _generate(self, job: Job) -> None:
        decoding, count = Decoding(self._tokenizer, job.stops), 0
        for token in self._session.generate(job.prompt, job.max_new_tokens, adapter=job.adapter):
            if job.cancelled.is_set():
                return
            count += 1
            self.tokens += 1
            text = decoding.push(token)
            if decoding.stopped:
                job.send(Piece(text=text, tokens=count, reason="stop"))
                return
            if text:
                job.send(Piece(text=text, tokens=count))
        reason: Reason = "length" if count >= job.max_new_tokens else "stop"
        job.send(Piece(text=decoding.end(), tokens=count, reason=reason))
