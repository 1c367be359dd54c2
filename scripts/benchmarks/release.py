"""Benchmarks of what comes after a search: the release desk and the HTTP service."""

from __future__ import annotations

import json
import os
import random
import socket
import statistics
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import requests
from mlflow import MlflowClient

from benchmarks.common import EDGEOPT, cli, engine_of, only, timed
from edgeopt.cli.commands import engines
from edgeopt.release.ledger.operation import Desk
from edgeopt.serving.request_parser import RequestParser

PROMPTS = ("def read_lines(path):", "import os\n", "class Stack:\n", "for i in range(", "x = [")
ENTRIES = 1000


def releases(folder: Path) -> None:
    """Commands on a registered model whose ledger has some thousand entries."""
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    promoted(MlflowClient(tracking_uri=uri), "edgeopt", ENTRIES // 3)
    for command in ("audit", "releases"):
        started = partial(cli, folder, command, "edgeopt", "--tracking-uri", uri)
        timed(f"edgeopt {command}, start and MLflow's import included", started)
    print()


def promoted(client: MlflowClient, name: str, times: int) -> None:
    """A registered model of two versions, of which one and then the other was promoted so many times."""
    client.create_registered_model(name)
    for _ in range(2):
        client.create_model_version(name, "bench:/made/up")
    desk = Desk(client, name)
    for number in range(times):
        with desk.operation("promotion", "bench"):
            desk.move({"champion": str(1 + number % 2)})


def service(folder: Path, seconds: float = 120.0) -> None:
    """`edgeopt serve` under 8 clients, of whom some leave and some talk nonsense: answers, memory, time of a token."""
    document = cli(folder, "run", "recipe=int4", *only())
    engine = engine_of(folder, document)
    right, direct = alone(engine)
    with serving(folder, engine) as (url, process):
        gaps = list(tokens_of(url, PROMPTS[0], 64))
        outcomes: Counter[str] = Counter()
        end = time.monotonic() + seconds
        clients = [threading.Thread(target=client, args=(url, n, end, right, outcomes)) for n in range(8)]
        for thread in clients:
            thread.start()
        time.sleep(seconds / 4)
        early = process.memory_info().rss
        for thread in clients:
            thread.join()
        late = process.memory_info().rss
        gaps += tokens_of(url, PROMPTS[0], 64)
        known = requests.get(f"{url}/metrics", timeout=5).text
    print(", ".join(f"{count} {name}" for name, count in sorted(outcomes.items())))
    print(f"memory: {early / 2**20:.1f} MiB after a quarter of the time, {late / 2**20:.1f} MiB at the end")
    median, p95 = statistics.median(gaps) * 1000, statistics.quantiles(gaps, n=20)[-1] * 1000
    print(f"a token takes {median:.2f} ms in the median and {p95:.2f} ms at its 95th percentile; ", end="")
    print(f"{direct * 1000:.2f} ms from the engine alone")
    print(known)


def alone(engine: Path) -> tuple[dict[str, str], float]:
    """What the engine itself answers to each prompt, and its seconds a token in the median."""
    with engines.opened(str(engine)) as (opened, runtime):
        parser = RequestParser(opened, "bench", context_length=opened.spec.context_length)
        session = runtime.open(opened, threads=len(os.sched_getaffinity(0)))
        right, gaps = {}, []
        for prompt in PROMPTS:
            ids, new = parser.parse_completion({"prompt": prompt}).prompt, []
            last = time.perf_counter()
            for token in session.generate(ids, 32):
                now = time.perf_counter()
                gaps.append(now - last)
                last = now
                new.append(token)
            right[prompt] = parser.tokenizer.decode(new)
        session.close()
    return right, statistics.median(gaps)


@contextmanager
def serving(folder: Path, engine: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A running `edgeopt serve`, which must end cleanly."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = subprocess.Popen([EDGEOPT, "serve", str(engine), "--port", str(port)], cwd=folder)
    url = f"http://127.0.0.1:{port}"
    for _ in range(300):
        try:
            if requests.get(f"{url}/health", timeout=1).ok:
                break
        except requests.RequestException:
            time.sleep(0.2)
    yield url, psutil.Process(started.pid)
    started.terminate()
    assert started.wait(60) in (0, -15)


def tokens_of(url: str, prompt: str, count: int) -> Iterator[float]:
    """Seconds between the pieces of a stream."""
    body = {"prompt": prompt, "max_tokens": count, "stream": True}
    with requests.post(f"{url}/v1/completions", json=body, stream=True, timeout=60) as answer:
        last = None
        for line in answer.iter_lines(chunk_size=1):
            if line.startswith(b"data: {"):
                now = time.perf_counter()
                if last is not None:
                    yield now - last
                last = now


def client(url: str, seed: int, end: float, right: dict[str, str], outcomes: Counter[str]) -> None:
    chance = random.Random(seed)
    while time.monotonic() < end:
        prompt = chance.choice(PROMPTS)
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": 32, "stream": chance.random() < 0.5}
        try:
            outcomes[asked(url, chance, body, right[prompt])] += 1
        except requests.RequestException as error:
            outcomes[type(error).__name__] += 1


def asked(url: str, chance: random.Random, body: dict[str, Any], right: str) -> str:
    """What became of one request."""
    kind = chance.random()
    if kind < 0.15:  # nonsense
        data = chance.choice([b"{", b"[]", b'{"prompt": 7}', json.dumps(body | {"n": 3}).encode()])
        answer = requests.post(f"{url}/v1/completions", data=data, timeout=60)
        return "refused" if answer.status_code == 400 else f"nonsense answered with {answer.status_code}"
    with requests.post(f"{url}/v1/completions", json=body, stream=True, timeout=60) as answer:
        if answer.status_code == 503:
            return "told to come back"
        if answer.status_code != 200:
            return f"status {answer.status_code}"
        if kind < 0.3:
            next(answer.iter_content(16), b"")
            return "left"
        return "right" if text_of(answer, stream=body["stream"]) == right else "wrong"


def text_of(answer: requests.Response, *, stream: bool) -> str:
    if not stream:
        return str(answer.json()["choices"][0]["text"])
    lines: Sequence[bytes] = [line[6:] for line in answer.iter_lines() if line.startswith(b"data: {")]
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines)
