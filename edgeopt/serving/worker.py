"""Generate text in one thread and queue the requests that wait for it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from edgeopt.errors import EdgeoptError
from edgeopt.serving.detokenizer import Detokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from edgeopt.core.protocols import Session
    from edgeopt.serving.request_parser import CompletionRequest

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """The next part of a completion.

    Attributes:
        completion_tokens: number of tokens generated so far, including this chunk.
        finish_reason: set on the last chunk only.
    """

    text: str
    completion_tokens: int
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request in the queue of the worker.

    Attributes:
        send: receives each chunk, or the error that ended the job, in the worker's thread. It must not block.
        cancelled: set by the client to skip or end the job.
    """

    request: CompletionRequest
    send: Callable[[Chunk | EdgeoptError], None]
    cancelled: threading.Event = field(default_factory=threading.Event)


class QueueFullError(Exception):
    """The queue holds its maximum number of requests."""


class Worker:
    """A thread that generates completions, one job after another in the order of arrival.

    Attributes:
        generated_tokens: number of tokens generated since the start.
    """

    def __init__(self, session: Session, tokenizer: Tokenizer, *, queue_size: int) -> None:
        self._session, self._tokenizer = session, tokenizer
        self._jobs: queue.Queue[Job | None] = queue.Queue(maxsize=queue_size)
        self.generated_tokens = 0
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    @property
    def queued_requests(self) -> int:
        """Return the number of requests in the queue."""
        return self._jobs.qsize()

    @property
    def is_alive(self) -> bool:
        """Return whether the thread is running."""
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Append a job to the queue. Raise QueueFullError if the queue is full."""
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise QueueFullError from None

    def close(self) -> None:
        """Finish the queued jobs, stop the thread and close the session."""
        self._jobs.put(None)
        self._thread.join()
        self._session.close()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            if job.cancelled.is_set():
                continue
            try:
                self._generate(job)
            except EdgeoptError as error:
                job.send(error)
            except Exception as error:  # one failed request must not stop the thread
                job.send(EdgeoptError(f"generation failed ({type(error).__name__}: {error})"))

    def _generate(self, job: Job) -> None:
        request, count = job.request, 0
        detokenizer = Detokenizer(self._tokenizer, request.stop)
        for token in self._session.generate(request.prompt, request.max_tokens, adapter=request.adapter):
            if job.cancelled.is_set():
                return
            count += 1
            self.generated_tokens += 1
            text = detokenizer.push(token)
            if detokenizer.stopped:
                job.send(Chunk(text=text, completion_tokens=count, finish_reason="stop"))
                return
            if text:
                job.send(Chunk(text=text, completion_tokens=count))
        reason: FinishReason = "length" if count >= request.max_tokens else "stop"
        job.send(Chunk(text=detokenizer.flush(), completion_tokens=count, finish_reason=reason))
