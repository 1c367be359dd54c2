"""The HTTP service, asked as a client asks it."""

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
from edgeopt.measure.harness.fake_runtime import FakeRuntime
from edgeopt.serving.app import LONGEST_BODY, Service
from edgeopt.serving.requests import Reader
from edgeopt.serving.worker import Worker

PROMPT = "def f ("


class Running:
    """A service on a free port of this machine."""

    def __init__(self, engine: Engine, *, token_s: float = 0.0, waiting: int = 16, patience_s: float = 30.0) -> None:
        self.session = FakeRuntime(token_s=token_s).open(engine, threads=1)
        reader = Reader(engine, "toy", context_length=engine.spec.context_length)
        self.worker = Worker(self.session, reader.tokenizer, waiting=waiting)
        self.service = Service(reader, self.worker, patience_s=patience_s)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        config = uvicorn.Config(self.service.app(), port=port, log_level="error", timeout_graceful_shutdown=5)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> Running:
        self._thread.start()
        end = time.monotonic() + 20
        while not self._server.started and time.monotonic() < end:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    def post(self, path: str, body: Any, **more: Any) -> requests.Response:
        return requests.post(self.url + path, timeout=30, **({"json": body} | more))

    def metrics(self) -> dict[str, float]:
        lines = requests.get(f"{self.url}/metrics", timeout=5).text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return samples.engine(tmp_path_factory.mktemp("engine") / "engine")


@pytest.fixture(scope="module")
def running(engine: Engine) -> Iterator[Running]:
    with Running(engine) as service:
        yield service


def expected(engine: Engine, count: int) -> str:
    """What the engine says after PROMPT, asked directly."""
    reader = Reader(engine, "toy", context_length=64)
    ids = reader.completion({"prompt": PROMPT}).prompt
    new = list(FakeRuntime().open(engine, threads=1).generate(ids, count))
    return str(reader.tokenizer.decode(new))


def client(running: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


def test_the_official_client_gets_a_completion(running: Running, engine: Engine) -> None:
    answer = client(running).completions.create(model="toy", prompt=PROMPT, max_tokens=9)
    assert answer.choices[0].text == expected(engine, 9)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 9)
    assert [model.id for model in client(running).models.list()] == ["toy"]


def test_the_official_client_streams_the_same_text(running: Running, engine: Engine) -> None:
    stream = client(running).completions.create(
        model="toy", prompt=PROMPT, max_tokens=9, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == expected(engine, 9)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 9
    assert chunks[-2].choices[0].finish_reason == "length"
    assert len(chunks) > 5


def test_the_official_client_chats(running: Running, engine: Engine) -> None:
    messages: Any = [{"role": "user", "content": PROMPT}]
    answer = client(running).chat.completions.create(model="toy", messages=messages, max_tokens=9)
    assert answer.choices[0].message.content == expected(engine, 9)
    stream = client(running).chat.completions.create(model="toy", messages=messages, max_tokens=9, stream=True)
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected(engine, 9)


def test_a_stop_text_ends_a_completion(running: Running, engine: Engine) -> None:
    whole = expected(engine, 9)
    stop = whole[4:7]
    answer = client(running).completions.create(model="toy", prompt=PROMPT, max_tokens=9, stop=stop)
    assert answer.choices[0].text == whole[: whole.find(stop)]
    assert answer.choices[0].finish_reason == "stop"


WRONG: dict[str, tuple[Any, str, str]] = {
    "no object": ([1], "body", "no JSON object"),
    "no prompt": ({}, "prompt", "neither a text nor token ids"),
    "two prompts": ({"prompt": ["a", "b"]}, "prompt", "more than one"),
    "foreign ids": ({"prompt": [1, 99999]}, "prompt", "neither a text nor token ids"),
    "an empty prompt": ({"prompt": ""}, "prompt", "0 tokens cannot be continued"),
    "a long prompt": ({"prompt": "f " * 64}, "prompt", "64 tokens cannot be continued"),
    "no tokens": ({"prompt": "f", "max_tokens": 0}, "max_tokens", "cannot be generated"),
    "a number as text": ({"prompt": "f", "max_tokens": "9"}, "max_tokens", "cannot be generated"),
    "sampling": ({"prompt": "f", "temperature": 0.7}, "temperature", "decodes greedily"),
    "two choices": ({"prompt": "f", "n": 2}, "n", "one completion at a time"),
    "logprobs": ({"prompt": "f", "logprobs": 3}, "logprobs", "not offered"),
    "a stop that is none": ({"prompt": "f", "stop": [""]}, "stop", "neither a text nor a list"),
    "an adapter": ({"prompt": "f", "adapter": "x"}, "adapter", "There are: none"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_bad_request_is_refused_with_the_field_and_the_mend(running: Running, fault: str) -> None:
    body, param, message = WRONG[fault]
    answer = running.post("/v1/completions", body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"]


def test_what_is_no_json_too_long_or_another_model_is_refused(running: Running) -> None:
    assert running.post("/v1/completions", None, data=b"{", json=None).status_code == 400
    assert running.post("/v1/completions", None, data=b"[" * 100_000, json=None).status_code == 400
    assert "longer than" in running.post("/v1/completions", {"prompt": "f" * LONGEST_BODY}).text
    answer = running.post("/v1/completions", {"model": "gpt-4", "prompt": "f"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    for messages in (None, [], ["x"], [{"role": "user"}], [{"role": "user", "content": [{"type": "image_url"}]}]):
        assert running.post("/v1/chat/completions", {"messages": messages}).status_code == 400


def test_health_and_metrics_tell_how_it_is(running: Running) -> None:
    before = running.metrics()
    assert requests.get(f"{running.url}/health", timeout=5).json() == {"status": "ok"}
    running.post("/v1/completions", {"prompt": "f", "max_tokens": 5})
    after = running.metrics()
    assert after["edgeopt_tokens_total"] - before["edgeopt_tokens_total"] == 5
    ok = 'edgeopt_requests_total{status="200"}'
    assert after[ok] - before.get(ok, 0) == 1


def test_a_client_that_leaves_stops_the_work(engine: Engine) -> None:
    with Running(engine, token_s=0.05) as slow:
        for stream in (True, False):
            before = slow.worker.tokens
            leave(slow, {"prompt": "f", "max_tokens": 60, "stream": stream})
            time.sleep(0.5)
            assert slow.worker.tokens - before < 40
            assert slow.post("/v1/completions", {"prompt": "f", "max_tokens": 1}).status_code == 200
        assert slow.metrics()['edgeopt_requests_total{status="499"}'] == 2


def leave(running: Running, body: dict[str, Any]) -> None:
    """Ask, and go before the answer is there."""
    with (
        contextlib.suppress(requests.Timeout),
        requests.post(f"{running.url}/v1/completions", json=body, stream=True, timeout=0.4),
    ):
        time.sleep(0.2)


def test_more_requests_than_may_wait_are_told_to_come_back(engine: Engine) -> None:
    with Running(engine, token_s=0.05, waiting=1) as slow, ThreadPoolExecutor(6) as clients:
        body = {"prompt": "f", "max_tokens": 10}
        answers = list(clients.map(lambda _: slow.post("/v1/completions", body), range(6)))
        codes = sorted(answer.status_code for answer in answers)
        assert set(codes) == {200, 503}
        refused = next(answer for answer in answers if answer.status_code == 503)
        assert refused.headers["retry-after"] == "1"
        assert "too many requests wait" in refused.json()["error"]["message"]


def test_a_request_that_takes_too_long_is_given_up(engine: Engine) -> None:
    with Running(engine, token_s=0.1, patience_s=0.3) as slow:
        answer = slow.post("/v1/completions", {"prompt": "f", "max_tokens": 50})
        assert answer.status_code == 504
        assert "longer than 0.3 s" in answer.json()["error"]["message"]
        streamed = slow.post("/v1/completions", {"prompt": "f", "max_tokens": 50, "stream": True})
        events = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: ")]
        assert "longer than 0.3 s" in json.loads(events[-1])["error"]["message"]


def test_a_session_that_fails_answers_the_next_request(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with Running(engine) as service:
        generate = service.session.generate
        monkeypatch.setattr(type(service.session), "generate", lambda *_, **__: 1 / 0)
        answer = service.post("/v1/completions", {"prompt": "f"})
        assert answer.status_code == 500
        assert "generation failed (ZeroDivisionError" in answer.json()["error"]["message"]
        monkeypatch.setattr(type(service.session), "generate", lambda _, *a, **k: generate(*a, **k))
        assert service.post("/v1/completions", {"prompt": "f"}).status_code == 200


def test_it_ends_cleanly_while_it_is_asked(engine: Engine) -> None:
    with ThreadPoolExecutor(1) as clients:
        with Running(engine, token_s=0.02) as service:
            asked = clients.submit(service.post, "/v1/completions", {"prompt": "f", "max_tokens": 20})
            time.sleep(0.2)
        assert asked.result().status_code == 200, "who is being served is served to the end"
    assert not service.worker.alive


TEMPLATE = (
    "{% for message in messages %}{{ message.role }} : {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}def{% endif %}"
)


def test_a_chat_is_written_by_the_models_own_template(tmp_path: Path) -> None:
    engine = samples.engine(tmp_path / "engine")
    (tmp_path / "engine" / "chat_template.jinja").write_text(TEMPLATE)
    reader = Reader(engine, "toy", context_length=64)
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": [{"type": "text", "text": "1"}]}]
    asked = reader.chat({"messages": messages})
    assert asked.prompt == reader.tokenizer.encode("user : x assistant : 1 def", add_special_tokens=False).ids
    (tmp_path / "engine" / "chat_template.jinja").write_text("{{ raise_exception('no system prompt') }}")
    refusing = Reader(engine, "toy", context_length=64)
    with pytest.raises(Exception, match="chat template refuses \\(no system prompt\\)"):
        refusing.chat({"messages": messages})
    (tmp_path / "engine" / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    with pytest.raises(Exception, match="unsafe"):
        Reader(engine, "toy", context_length=64).chat({"messages": messages})
