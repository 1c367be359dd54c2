"""Serve completions, chat completions, health and metrics over HTTP."""

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
from edgeopt.serving.request_parser import CompletionRequest, ModelNotFoundError, RequestParser
from edgeopt.serving.worker import Chunk, Job, QueueFullError, Worker

if TYPE_CHECKING:
    from starlette.types import Message

MAX_BODY_BYTES = 2**20
"""Largest request body."""
_CLIENT_CLOSED_REQUEST = 499
"""Status of a request whose client disconnected, as in nginx. Only the metrics show it."""


class RequestTimeoutError(EdgeoptError):
    """A request exceeded its timeout."""


class Service:
    """The HTTP service of one engine.

    Attributes:
        timeout_s: limit of a request in seconds, including its time in the queue.
        response_counts: number of finished requests by HTTP status.
    """

    def __init__(self, parser: RequestParser, worker: Worker, *, timeout_s: float) -> None:
        self.parser, self.worker, self.timeout_s = parser, worker, timeout_s
        self.response_counts: Counter[int] = Counter()

    def app(self) -> Starlette:
        """Return the ASGI application. Its shutdown closes the worker."""
        return Starlette(
            routes=[
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/chat/completions", self._chat_completions, methods=["POST"]),
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
        return await self._complete(request, self.parser.parse_completion, _CompletionFormat)

    async def _chat_completions(self, request: Request) -> Response:
        return await self._complete(request, self.parser.parse_chat, _ChatFormat)

    async def _models(self, _: Request) -> Response:
        model = {"id": self.parser.model_name, "object": "model", "created": 0, "owned_by": "edgeopt"}
        return JSONResponse({"object": "list", "data": [model]})

    async def _health(self, _: Request) -> Response:
        alive = self.worker.is_alive
        return JSONResponse({"status": "ok" if alive else "not generating"}, status_code=200 if alive else 503)

    async def _metrics(self, _: Request) -> Response:
        """Return metrics in Prometheus' text format (https://prometheus.io/docs/instrumenting/exposition_formats)."""
        counts = sorted(self.response_counts.items())
        lines = ["# TYPE edgeopt_requests_total counter"]
        lines += [f'edgeopt_requests_total{{status="{status}"}} {count}' for status, count in counts]
        lines += ["# TYPE edgeopt_tokens_total counter", f"edgeopt_tokens_total {self.worker.generated_tokens}"]
        lines += ["# TYPE edgeopt_requests_waiting gauge", f"edgeopt_requests_waiting {self.worker.queued_requests}"]
        return PlainTextResponse("\n".join(lines) + "\n")

    async def _complete(
        self, http_request: Request, parse: Callable[[Any], CompletionRequest], format_type: type[_ResponseFormat]
    ) -> Response:
        try:
            request = parse(await _read_json(http_request))
            chunks = _ChunkStream(request, self.worker, self.timeout_s)
        except ConfigError as error:
            return self._error_response(404 if isinstance(error, ModelNotFoundError) else 400, error)
        except QueueFullError:
            queue_full = EdgeoptError("the request queue is full", hint="Retry later")
            return self._error_response(503, queue_full, {"Retry-After": "1"})
        response_format = format_type(self.parser.model_name, request)
        if request.stream:
            return StreamingResponse(self._stream_events(response_format, chunks), media_type="text/event-stream")
        return await self._full_response(http_request, response_format, chunks)

    async def _full_response(
        self, http_request: Request, response_format: _ResponseFormat, chunks: _ChunkStream
    ) -> Response:
        disconnect = asyncio.create_task(_wait_for_disconnect(http_request.receive))
        disconnect.add_done_callback(lambda _: chunks.cancel())
        texts, last = [], None
        try:
            async for chunk in chunks:
                texts.append(chunk.text)
                last = chunk
        except EdgeoptError as error:
            return self._error_response(_error_status(error), error)
        finally:
            disconnect.cancel()
        if last is None or last.finish_reason is None:  # the client disconnected
            self.response_counts[_CLIENT_CLOSED_REQUEST] += 1
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        self.response_counts[200] += 1
        return JSONResponse(response_format.response("".join(texts), last))

    async def _stream_events(self, response_format: _ResponseFormat, chunks: _ChunkStream) -> AsyncIterator[bytes]:
        status = _CLIENT_CLOSED_REQUEST
        try:
            for event in response_format.opening_events():
                yield _encode_event(event)
            async for chunk in chunks:
                for event in response_format.chunk_events(chunk):
                    yield _encode_event(event)
            yield b"data: [DONE]\n\n"
            status = 200
        except EdgeoptError as error:
            status = _error_status(error)
            yield _encode_event(_error_document(error))
        finally:  # runs also when the client disconnects
            chunks.cancel()
            self.response_counts[status] += 1

    def _error_response(self, status: int, error: EdgeoptError, headers: dict[str, str] | None = None) -> Response:
        self.response_counts[status] += 1
        return JSONResponse(_error_document(error), status_code=status, headers=headers)


class _ChunkStream:
    """Submit one request to the worker and iterate over its chunks. The iteration ends early after `cancel`."""

    def __init__(self, request: CompletionRequest, worker: Worker, timeout_s: float) -> None:
        loop, self._deadline_s = asyncio.get_running_loop(), time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._received: asyncio.Queue[Chunk | EdgeoptError | None] = asyncio.Queue()

        def send(chunk: Chunk | EdgeoptError) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop may be closed during shutdown
                loop.call_soon_threadsafe(self._received.put_nowait, chunk)

        self._job = Job(request=request, send=send)
        worker.submit(self._job)

    def cancel(self) -> None:
        """End the iteration and tell the worker to skip the rest."""
        self._job.cancelled.set()
        self._received.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        while True:
            await asyncio.sleep(0)  # let other requests run even if many chunks are available
            try:
                async with asyncio.timeout(self._deadline_s - time.monotonic()):
                    chunk = await self._received.get()
            except TimeoutError:
                self._job.cancelled.set()
                raise RequestTimeoutError(f"the request exceeded the timeout of {self._timeout_s:g} s") from None
            if chunk is None:
                return
            if isinstance(chunk, EdgeoptError):
                raise chunk
            yield chunk
            if chunk.finish_reason is not None:
                return


class _ResponseFormat:
    """The JSON documents of one endpoint.

    Attributes:
        object_type: value of `object` in a full response.
        chunk_object_type: value of `object` in the events of a stream.
        id_prefix: prefix of response ids.
    """

    object_type, chunk_object_type, id_prefix = "", "", ""

    def __init__(self, model_name: str, request: CompletionRequest) -> None:
        self._request = request
        response_id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self._common_fields = {"id": response_id, "created": int(time.time()), "model": model_name}

    def response(self, text: str, last: Chunk) -> dict[str, Any]:
        """Return the full response of a request that does not stream."""
        choice = {"index": 0, "logprobs": None, "finish_reason": last.finish_reason, **self._text_fields(text)}
        return {**self._common_fields, "object": self.object_type, "choices": [choice], "usage": self._usage(last)}

    def opening_events(self) -> list[dict[str, Any]]:
        """Return the events that precede the first chunk of a stream."""
        return []

    def chunk_events(self, chunk: Chunk) -> list[dict[str, Any]]:
        """Return the events of one chunk of a stream."""
        events = [self._event(self._delta_fields(chunk.text), chunk.finish_reason)]
        if chunk.finish_reason is not None and self._request.include_usage:
            events.append(
                {
                    **self._common_fields,
                    "object": self.chunk_object_type,
                    "choices": [],
                    "usage": self._usage(chunk),
                }
            )
        return events

    def _event(self, fields: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "logprobs": None, "finish_reason": finish_reason, **fields}
        return {**self._common_fields, "object": self.chunk_object_type, "choices": [choice]}

    def _usage(self, last: Chunk) -> dict[str, int]:
        prompt_tokens, completion_tokens = len(self._request.prompt), last.completion_tokens
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }

    def _text_fields(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _delta_fields(self, text: str) -> dict[str, Any]:
        raise NotImplementedError


class _CompletionFormat(_ResponseFormat):
    object_type = chunk_object_type = "text_completion"
    id_prefix = "cmpl"

    def _text_fields(self, text: str) -> dict[str, Any]:
        return {"text": text}

    _delta_fields = _text_fields


class _ChatFormat(_ResponseFormat):
    object_type, chunk_object_type, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening_events(self) -> list[dict[str, Any]]:
        return [self._event({"delta": {"role": "assistant", "content": ""}}, None)]

    def _text_fields(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def _delta_fields(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}


async def _read_json(request: Request) -> Any:
    """Return the parsed body. Raise ConfigError if it is too long or not valid JSON."""
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > MAX_BODY_BYTES:
            raise ConfigError(f"the body must not exceed {MAX_BODY_BYTES} bytes", location="body")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the body is not valid JSON ({error})", location="body") from error


async def _wait_for_disconnect(receive: Callable[[], Any]) -> None:
    """Return when the client disconnects."""
    message: Message = {"type": ""}
    while message["type"] != "http.disconnect":
        message = await receive()


def _error_status(error: EdgeoptError) -> int:
    """Return the HTTP status of an error during generation."""
    return 504 if isinstance(error, RequestTimeoutError) else 500


def _error_document(error: EdgeoptError) -> dict[str, Any]:
    """Return the error object of OpenAI's API."""
    error_type = "invalid_request_error" if isinstance(error, ConfigError) else "server_error"
    code = "model_not_found" if isinstance(error, ModelNotFoundError) else None
    return {"error": {"message": str(error), "type": error_type, "param": error.location or None, "code": code}}


def _encode_event(document: dict[str, Any]) -> bytes:
    """Encode a document as a server-sent event."""
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n".encode()
