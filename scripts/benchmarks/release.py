"""Benchmark the commands on releases and the HTTP service."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import requests
from mlflow import MlflowClient

from benchmarks.common import EDGEOPT, cli, engine_folder, only, print_time
from edgeopt.cli.commands import engines
from edgeopt.release.ledger.operation import ReleaseOperation
from edgeopt.serving.request_parser import RequestParser

PROMPTS = ("def read_lines(path):", "import os\n", "class Stack:\n", "for i in range(", "x = [")
ENTRIES = 1000


def releases(folder: Path) -> None:
    """Time of commands on a registered model whose ledger has about a thousand entries."""
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    create_promoted_model(MlflowClient(tracking_uri=uri), "edgeopt", ENTRIES // 3)
    for command in ("audit", "releases"):
        run = partial(cli, folder, command, "edgeopt", "--tracking-uri", uri)
        print_time(f"edgeopt {command}, including start-up", run)
    print()


def create_promoted_model(client: MlflowClient, name: str, promotions: int) -> None:
    """Register a model with two versions and promote them in turn."""
    client.create_registered_model(name)
    for _ in range(2):
        client.create_model_version(name, "bench:/made/up")
    operation = ReleaseOperation(client, name)
    for number in range(promotions):
        with operation.run("promotion", "bench"):
            operation.move({"champion": str(1 + number % 2)})


def service(folder: Path, seconds: float = 120.0) -> None:
    """Outcomes, memory and latency of `edgeopt serve` with 8 clients that also disconnect or send invalid requests."""
    document = cli(folder, "run", "recipe=int4", *only())
    engine = engine_folder(folder, document)
    expected, engine_s = generate_directly(engine)
    with serve(folder, engine) as (url, process):
        gaps = list(stream_gaps(url, PROMPTS[0], 64))
        outcomes: Counter[str] = Counter()
        end = time.monotonic() + seconds
        clients = [threading.Thread(target=send_requests, args=(url, n, end, expected, outcomes)) for n in range(8)]
        for thread in clients:
            thread.start()
        time.sleep(seconds / 4)
        early_bytes = process.memory_info().rss
        for thread in clients:
            thread.join()
        late_bytes = process.memory_info().rss
        gaps += stream_gaps(url, PROMPTS[0], 64)
        service_metrics = requests.get(f"{url}/metrics", timeout=5).text
    print(", ".join(f"{count} {name}" for name, count in sorted(outcomes.items())))
    print(f"memory: {early_bytes / 2**20:.1f} MiB after a quarter of the time, {late_bytes / 2**20:.1f} MiB at the end")
    median, p95 = statistics.median(gaps) * 1000, statistics.quantiles(gaps, n=20)[-1] * 1000
    print(f"token latency: median {median:.2f} ms, p95 {p95:.2f} ms; ", end="")
    print(f"median without the service {engine_s * 1000:.2f} ms")
    print(service_metrics)


def generate_directly(engine: Path) -> tuple[dict[str, str], float]:
    """Return the engine's text for each prompt, and the median seconds per token, without the service."""
    with engines.opened(str(engine)) as (opened, runtime):
        parser = RequestParser(opened, "bench", context_length=opened.spec.context_length)
        session = runtime.open(opened, threads=len(os.sched_getaffinity(0)))
        expected, gaps = {}, []
        for prompt in PROMPTS:
            prompt_ids, new_ids = parser.parse_completion({"prompt": prompt}).prompt, []
            last = time.perf_counter()
            for token in session.generate(prompt_ids, 32):
                now = time.perf_counter()
                gaps.append(now - last)
                last = now
                new_ids.append(token)
            expected[prompt] = parser.tokenizer.decode(new_ids)
        session.close()
    return expected, statistics.median(gaps)


@contextlib.contextmanager
def serve(folder: Path, engine: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Run `edgeopt serve` and yield its URL and process.

    Raises:
        RuntimeError: the service does not answer within a minute, or its exit code shows a failure.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([EDGEOPT, "serve", str(engine), "--port", str(port)], cwd=folder)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(url)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        code = process.wait(60)
    if code not in (0, -signal.SIGTERM):
        raise RuntimeError(f"`edgeopt serve` must end with exit code 0 or by SIGTERM, got {code}")


def wait_until_healthy(url: str, timeout_s: float = 60.0) -> None:
    """Return when the service answers; raise RuntimeError if it does not within `timeout_s` seconds."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{url}/health", timeout=1).ok:
                return
        time.sleep(0.2)
    raise RuntimeError(f"{url} must answer within {timeout_s:.0f} s. See the output of `edgeopt serve` above.")


def stream_gaps(url: str, prompt: str, count: int) -> Iterator[float]:
    """Yield the seconds between consecutive events of a stream."""
    body = {"prompt": prompt, "max_tokens": count, "stream": True}
    with requests.post(f"{url}/v1/completions", json=body, stream=True, timeout=60) as response:
        last = None
        for line in response.iter_lines(chunk_size=1):
            if line.startswith(b"data: {"):
                now = time.perf_counter()
                if last is not None:
                    yield now - last
                last = now


def send_requests(url: str, seed: int, end: float, expected: dict[str, str], outcomes: Counter[str]) -> None:
    """Send random requests until `end` and count their outcomes."""
    rng = random.Random(seed)
    while time.monotonic() < end:
        prompt = rng.choice(PROMPTS)
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": 32, "stream": rng.random() < 0.5}
        try:
            outcomes[send_request(url, rng, body, expected[prompt])] += 1
        except requests.RequestException as error:
            outcomes[type(error).__name__] += 1


def send_request(url: str, rng: random.Random, body: dict[str, Any], expected: str) -> str:
    """Send one request and return its outcome."""
    kind = rng.random()
    if kind < 0.15:  # invalid request
        data = rng.choice([b"{", b"[]", b'{"prompt": 7}', json.dumps(body | {"n": 3}).encode()])
        response = requests.post(f"{url}/v1/completions", data=data, timeout=60)
        return "rejected" if response.status_code == 400 else f"invalid request answered with {response.status_code}"
    with requests.post(f"{url}/v1/completions", json=body, stream=True, timeout=60) as response:
        if response.status_code == 503:
            return "overloaded"
        if response.status_code != 200:
            return f"status {response.status_code}"
        if kind < 0.3:
            next(response.iter_content(16), b"")
            return "disconnected"
        return "correct" if response_text(response, stream=body["stream"]) == expected else "wrong"


def response_text(response: requests.Response, *, stream: bool) -> str:
    """Return the generated text of a response."""
    if not stream:
        return str(response.json()["choices"][0]["text"])
    lines: Sequence[bytes] = [line[6:] for line in response.iter_lines() if line.startswith(b"data: {")]
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines)
