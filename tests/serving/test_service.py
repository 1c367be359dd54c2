"""Test the HTTP service through HTTP clients, among them the official one of OpenAI."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
import uvicorn
from support import samples

from edgeopt.core.artifact import Engine
from edgeopt.errors import ConfigError
from edgeopt.measure.harness.fake_runtime import FakeRuntime
from edgeopt.serving.app import MAX_BODY_BYTES, Service
from edgeopt.serving.request_parser import RequestParser
from edgeopt.serving.worker import Worker

PROMPT = "def f ("


class RunningService:
    """A service on a free port of this machine, with a fake engine that takes `token_s` seconds per token."""

    def __init__(self, engine: Engine, *, token_s: float = 0.0, queue_size: int = 16, timeout_s: float = 30.0) -> None:
        self.session = FakeRuntime(token_s=token_s).open(engine, threads=1)
        parser = RequestParser(engine, "toy", context_length=engine.spec.context_length)
        self.worker = Worker(self.session, parser.tokenizer, queue_size=queue_size)
        self.service = Service(parser, self.worker, timeout_s=timeout_s)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        config = uvicorn.Config(self.service.app(), port=port, log_level="error", timeout_graceful_shutdown=5)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> RunningService:
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self._server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    def post(self, path: str, body: Any, **arguments: Any) -> requests.Response:
        return requests.post(self.url + path, timeout=30, **({"json": body} | arguments))

    def metrics(self) -> dict[str, float]:
        lines = requests.get(f"{self.url}/metrics", timeout=5).text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return samples.engine(tmp_path_factory.mktemp("engine") / "engine")


@pytest.fixture(scope="module")
def running(engine: Engine) -> Iterator[RunningService]:
    with RunningService(engine) as service:
        yield service


def generate(engine: Engine, count: int) -> str:
    """Return the text that the engine itself generates after PROMPT, without the service."""
    parser = RequestParser(engine, "toy", context_length=64)
    prompt = parser.parse_completion({"prompt": PROMPT}).prompt
    tokens = list(FakeRuntime().open(engine, threads=1).generate(prompt, count))
    return str(parser.tokenizer.decode(tokens))


def openai_client(running: RunningService) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


def test_openai_client_gets_completion(running: RunningService, engine: Engine) -> None:
    answer = openai_client(running).completions.create(model="toy", prompt=PROMPT, max_tokens=9)
    assert answer.choices[0].text == generate(engine, 9)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 9)
    assert [model.id for model in openai_client(running).models.list()] == ["toy"]


def test_openai_client_streams_same_text(running: RunningService, engine: Engine) -> None:
    stream = openai_client(running).completions.create(
        model="toy", prompt=PROMPT, max_tokens=9, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == generate(engine, 9)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 9
    assert chunks[-2].choices[0].finish_reason == "length"
    assert len(chunks) > 5


def test_openai_client_chats(running: RunningService, engine: Engine) -> None:
    messages: Any = [{"role": "user", "content": PROMPT}]
    answer = openai_client(running).chat.completions.create(model="toy", messages=messages, max_tokens=9)
    assert answer.choices[0].message.content == generate(engine, 9)
    stream = openai_client(running).chat.completions.create(model="toy", messages=messages, max_tokens=9, stream=True)
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == generate(engine, 9)


def test_stop_text_ends_completion(running: RunningService, engine: Engine) -> None:
    text = generate(engine, 9)
    stop = text[4:7]
    answer = openai_client(running).completions.create(model="toy", prompt=PROMPT, max_tokens=9, stop=stop)
    assert answer.choices[0].text == text[: text.find(stop)]
    assert answer.choices[0].finish_reason == "stop"


INVALID_REQUESTS: dict[str, tuple[Any, str, str]] = {
    "body is not an object": ([1], "body", "must be a JSON object"),
    "prompt missing": ({}, "prompt", "must be one string or one list of token ids"),
    "two prompts": ({"prompt": ["a", "b"]}, "prompt", "must be one string or one list of token ids"),
    "unknown token id": ({"prompt": [1, 99999]}, "prompt", "must be one string or one list of token ids"),
    "empty prompt": ({"prompt": ""}, "prompt", "must have 1 to 63 tokens, got 0"),
    "prompt too long": ({"prompt": "f " * 64}, "prompt", "must have 1 to 63 tokens, got 64"),
    "zero max_tokens": ({"prompt": "f", "max_tokens": 0}, "max_tokens", "must be a positive integer, got 0"),
    "max_tokens is text": ({"prompt": "f", "max_tokens": "9"}, "max_tokens", "must be a positive integer, got '9'"),
    "sampling": ({"prompt": "f", "temperature": 0.7}, "temperature", "decodes greedily"),
    "two completions": ({"prompt": "f", "n": 2}, "n", "one completion per request"),
    "logprobs": ({"prompt": "f", "logprobs": 3}, "logprobs", "not supported"),
    "empty stop text": ({"prompt": "f", "stop": [""]}, "stop", "must be a string or a list of up to 4"),
    "unknown adapter": ({"prompt": "f", "adapter": "x"}, "adapter", "Available adapters: none"),
}


@pytest.mark.parametrize("name", INVALID_REQUESTS)
def test_invalid_request_is_rejected_with_field(running: RunningService, name: str) -> None:
    body, param, message = INVALID_REQUESTS[name]
    answer = running.post("/v1/completions", body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"]


def test_invalid_body_or_model_is_rejected(running: RunningService) -> None:
    assert running.post("/v1/completions", None, data=b"{", json=None).status_code == 400
    assert running.post("/v1/completions", None, data=b"[" * 100_000, json=None).status_code == 400
    assert "must not exceed" in running.post("/v1/completions", {"prompt": "f" * MAX_BODY_BYTES}).text
    answer = running.post("/v1/completions", {"model": "gpt-4", "prompt": "f"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    for messages in (None, [], ["x"], [{"role": "user"}], [{"role": "user", "content": [{"type": "image_url"}]}]):
        assert running.post("/v1/chat/completions", {"messages": messages}).status_code == 400


def test_health_and_metrics_report_state(running: RunningService) -> None:
    before = running.metrics()
    assert requests.get(f"{running.url}/health", timeout=5).json() == {"status": "ok"}
    running.post("/v1/completions", {"prompt": "f", "max_tokens": 5})
    after = running.metrics()
    assert after["edgeopt_tokens_total"] - before["edgeopt_tokens_total"] == 5
    ok = 'edgeopt_requests_total{status="200"}'
    assert after[ok] - before.get(ok, 0) == 1


def test_client_disconnect_stops_generation(engine: Engine) -> None:
    with RunningService(engine, token_s=0.05) as slow:
        for stream in (True, False):
            before = slow.worker.generated_tokens
            disconnect_early(slow, {"prompt": "f", "max_tokens": 60, "stream": stream})
            time.sleep(0.5)
            assert slow.worker.generated_tokens - before < 40
            assert slow.post("/v1/completions", {"prompt": "f", "max_tokens": 1}).status_code == 200
        assert slow.metrics()['edgeopt_requests_total{status="499"}'] == 2


def disconnect_early(running: RunningService, body: dict[str, Any]) -> None:
    """Send a request and disconnect before the response is complete."""
    with (
        contextlib.suppress(requests.Timeout),
        requests.post(f"{running.url}/v1/completions", json=body, stream=True, timeout=0.4),
    ):
        time.sleep(0.2)


def test_full_queue_returns_503(engine: Engine) -> None:
    with RunningService(engine, token_s=0.05, queue_size=1) as slow, ThreadPoolExecutor(6) as clients:
        body = {"prompt": "f", "max_tokens": 10}
        answers = list(clients.map(lambda _: slow.post("/v1/completions", body), range(6)))
        codes = sorted(answer.status_code for answer in answers)
        assert set(codes) == {200, 503}
        refused = next(answer for answer in answers if answer.status_code == 503)
        assert refused.headers["retry-after"] == "1"
        assert "the request queue is full" in refused.json()["error"]["message"]


def test_slow_request_times_out(engine: Engine) -> None:
    with RunningService(engine, token_s=0.1, timeout_s=0.3) as slow:
        answer = slow.post("/v1/completions", {"prompt": "f", "max_tokens": 50})
        assert answer.status_code == 504
        assert "exceeded the timeout of 0.3 s" in answer.json()["error"]["message"]
        streamed = slow.post("/v1/completions", {"prompt": "f", "max_tokens": 50, "stream": True})
        events = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: ")]
        assert "exceeded the timeout of 0.3 s" in json.loads(events[-1])["error"]["message"]


def test_service_survives_failed_generation(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunningService(engine) as service:
        generate = service.session.generate
        monkeypatch.setattr(type(service.session), "generate", lambda *_, **__: 1 / 0)
        answer = service.post("/v1/completions", {"prompt": "f"})
        assert answer.status_code == 500
        assert "generation failed (ZeroDivisionError" in answer.json()["error"]["message"]
        monkeypatch.setattr(type(service.session), "generate", lambda _, *a, **k: generate(*a, **k))
        assert service.post("/v1/completions", {"prompt": "f"}).status_code == 200


def test_shutdown_completes_running_request(engine: Engine) -> None:
    with ThreadPoolExecutor(1) as clients:
        with RunningService(engine, token_s=0.02) as service:
            pending = clients.submit(service.post, "/v1/completions", {"prompt": "f", "max_tokens": 20})
            time.sleep(0.2)
        assert pending.result().status_code == 200
    assert not service.worker.is_alive


TEMPLATE = (
    "{% for message in messages %}{{ message.role }} : {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}def{% endif %}"
)


def test_chat_uses_template_of_model(tmp_path: Path) -> None:
    engine = samples.engine(tmp_path / "engine")
    template_path = tmp_path / "engine" / "chat_template.jinja"
    template_path.write_text(TEMPLATE)
    parser = RequestParser(engine, "toy", context_length=64)
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": [{"type": "text", "text": "1"}]}]
    request = parser.parse_chat({"messages": messages})
    assert request.prompt == parser.tokenizer.encode("user : x assistant : 1 def", add_special_tokens=False).ids
    template_path.write_text("{{ raise_exception('no system prompt') }}")
    rejecting = RequestParser(engine, "toy", context_length=64)
    with pytest.raises(ConfigError, match=r"chat template rejected the messages \(no system prompt\)"):
        rejecting.parse_chat({"messages": messages})
    template_path.write_text("{{ ''.__class__.__mro__ }}")
    with pytest.raises(ConfigError, match="unsafe"):
        RequestParser(engine, "toy", context_length=64).parse_chat({"messages": messages})
