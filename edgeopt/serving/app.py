"""The service: OpenAI's endpoints for chats and completions, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from edgeopt.errors import ConfigError, EdgeoptError
from edgeopt.serving.requests import Asked, Reader, UnknownModelError, told
from edgeopt.serving.worker import FullError, Job, Piece, Worker

if TYPE_CHECKING:
    from starlette.types import Message

LONGEST_BODY = 2**20
"""Bytes of a request."""
_GONE = 499  # nobody is there to read it: as in nginx


class SlowError(EdgeoptError):
    """A request took longer than it may."""


class Service:
    """Answers for one engine.

    Attributes:
        patience_s: how long a request may take, its time in the queue included.
    """

    def __init__(self, reader: Reader, worker: Worker, *, patience_s: float) -> None:
        self.reader, self.worker, self.patience_s = reader, worker, patience_s
        self.answers: Counter[int] = Counter()
        """How many requests ended with each status."""

    def app(self) -> Starlette:
        """To be served by any ASGI server; the worker ends with it."""
        return Starlette(
            routes=[
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/chat/completions", self._chats, methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/health", self._health),
                Route("/metrics", self._metrics),
            ],
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self.worker.close)

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, self.reader.completion, _Completion)

    async def _chats(self, request: Request) -> Response:
        return await self._answer(request, self.reader.chat, _Chat)

    async def _models(self, _: Request) -> Response:
        model = {"id": self.reader.name, "object": "model", "created": 0, "owned_by": "edgeopt"}
        return JSONResponse({"object": "list", "data": [model]})

    async def _health(self, _: Request) -> Response:
        alive = self.worker.alive
        return JSONResponse({"status": "ok" if alive else "not generating"}, status_code=200 if alive else 503)

    async def _metrics(self, _: Request) -> Response:
        """In the text format of Prometheus (https://prometheus.io/docs/instrumenting/exposition_formats)."""
        lines = ["# TYPE edgeopt_requests_total counter"]
        lines += [f'edgeopt_requests_total{{status="{code}"}} {n}' for code, n in sorted(self.answers.items())]
        lines += ["# TYPE edgeopt_tokens_total counter", f"edgeopt_tokens_total {self.worker.tokens}"]
        lines += ["# TYPE edgeopt_requests_waiting gauge", f"edgeopt_requests_waiting {self.worker.waiting}"]
        return PlainTextResponse("\n".join(lines) + "\n")

    async def _answer(self, request: Request, read: Callable[[Any], Asked], form: type[_Form]) -> Response:
        try:
            asked = read(await _body(request))
            pieces = _Pieces(asked, self.worker, self.patience_s)
        except ConfigError as error:
            return self._refused(404 if isinstance(error, UnknownModelError) else 400, error)
        except FullError:
            busy = EdgeoptError("too many requests wait", hint="Try again in a while")
            return self._refused(503, busy, {"Retry-After": "1"})
        answer = form(self.reader.name, asked)
        if asked.stream:
            return StreamingResponse(self._streamed(answer, pieces), media_type="text/event-stream")
        return await self._whole(request, answer, pieces)

    async def _whole(self, request: Request, answer: _Form, pieces: _Pieces) -> Response:
        leaving = asyncio.create_task(_left(request.receive))
        leaving.add_done_callback(lambda _: pieces.cancel())
        text, last = [], None
        try:
            async for piece in pieces:
                text.append(piece.text)
                last = piece
        except EdgeoptError as error:
            return self._refused(504 if isinstance(error, SlowError) else 500, error)
        finally:
            leaving.cancel()
        if last is None or last.reason is None:  # nobody waits for it any more
            self.answers[_GONE] += 1
            return Response(status_code=_GONE)
        self.answers[200] += 1
        return JSONResponse(answer.whole("".join(text), last))

    async def _streamed(self, answer: _Form, pieces: _Pieces) -> AsyncIterator[bytes]:
        status = _GONE
        try:
            for event in answer.first():
                yield _event(event)
            async for piece in pieces:
                for event in answer.piece(piece):
                    yield _event(event)
            yield b"data: [DONE]\n\n"
            status = 200
        except EdgeoptError as error:
            status = 504 if isinstance(error, SlowError) else 500
            yield _event(told(error))
        finally:  # also where the client has gone
            pieces.cancel()
            self.answers[status] += 1

    def _refused(self, status: int, error: EdgeoptError, headers: dict[str, str] | None = None) -> Response:
        self.answers[status] += 1
        return JSONResponse(told(error), status_code=status, headers=headers)


class _Pieces:
    """The pieces of one request as they come; ends early where it is cancelled."""

    def __init__(self, asked: Asked, worker: Worker, patience_s: float) -> None:
        loop, self._end = asyncio.get_running_loop(), time.monotonic() + patience_s
        self._patience_s = patience_s
        self._came: asyncio.Queue[Piece | EdgeoptError | None] = asyncio.Queue()

        def send(piece: Piece | EdgeoptError) -> None:
            with contextlib.suppress(RuntimeError):  # the service has ended meanwhile
                loop.call_soon_threadsafe(self._came.put_nowait, piece)

        self._job = Job(
            prompt=asked.prompt,
            max_new_tokens=asked.max_new_tokens,
            stops=asked.stops,
            adapter=asked.adapter,
            send=send,
        )
        worker.submit(self._job)

    def cancel(self) -> None:
        """Let the rest be left undone."""
        self._job.cancelled.set()
        self._came.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        while True:
            await asyncio.sleep(0)  # where many pieces are there already, others have their turn between two
            try:
                async with asyncio.timeout(self._end - time.monotonic()):
                    piece = await self._came.get()
            except TimeoutError:
                self._job.cancelled.set()
                raise SlowError(f"it took longer than {self._patience_s:g} s") from None
            if piece is None:
                return
            if isinstance(piece, EdgeoptError):
                raise piece
            yield piece
            if piece.reason is not None:
                return


class _Form:
    """How an endpoint tells what was generated."""

    kind, chunk, prefix = "", "", ""

    def __init__(self, model: str, asked: Asked) -> None:
        self._asked = asked
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, text: str, last: Piece) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        choice = {"index": 0, "logprobs": None, "finish_reason": last.reason, **self._text(text)}
        return {**self._head, "object": self.kind, "choices": [choice], "usage": self._usage(last)}

    def first(self) -> list[dict[str, Any]]:
        """What goes before the first piece of a stream."""
        return []

    def piece(self, piece: Piece) -> list[dict[str, Any]]:
        """The events for one piece of a stream."""
        events = [self._chunk(self._delta(piece.text), piece.reason)]
        if piece.reason is not None and self._asked.usage:
            events.append({**self._head, "object": self.chunk, "choices": [], "usage": self._usage(piece)})
        return events

    def _chunk(self, said: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "logprobs": None, "finish_reason": reason, **said}
        return {**self._head, "object": self.chunk, "choices": [choice]}

    def _usage(self, last: Piece) -> dict[str, int]:
        prompt = len(self._asked.prompt)
        return {"prompt_tokens": prompt, "completion_tokens": last.tokens, "total_tokens": prompt + last.tokens}

    def _text(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, text: str) -> dict[str, Any]:
        raise NotImplementedError


class _Completion(_Form):
    kind = chunk = "text_completion"
    prefix = "cmpl"

    def _text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    _delta = _text


class _Chat(_Form):
    kind, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def first(self) -> list[dict[str, Any]]:
        return [self._chunk({"delta": {"role": "assistant", "content": ""}}, None)]

    def _text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}


async def _body(request: Request) -> Any:
    """The JSON of a request. Raises ConfigError where it is none, or too long."""
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > LONGEST_BODY:
            raise ConfigError(f"it is longer than {LONGEST_BODY} bytes", location="body")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"it is no JSON ({error})", location="body") from error


async def _left(receive: Callable[[], Any]) -> None:
    """Returns when the client has gone."""
    message: Message = {"type": ""}
    while message["type"] != "http.disconnect":
        message = await receive()


def _event(document: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n".encode()
