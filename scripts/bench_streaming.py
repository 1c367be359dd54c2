"""Benchmark of models larger than memory: tokens under an enforced cap against what the disk allows."""

from __future__ import annotations

import json
import mmap
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_common import cli, engine_of, make_random_llama, only, table

CAP_MIB, SHARDS, TOKENS, ROUNDS, BLOCK = 512, 32, 8, 3, 8 * 2**20
BUDGETS_MIB = (0, 64, 128, 192, 256)
LENGTHS, KV_BUDGETS = (2048, 8192), ("1 GiB", "64 MiB", "0 B")
GENERATE = """
import json, statistics, sys, time
from pathlib import Path
from edgeopt.artifact import Engine
from edgeopt.measure import process
from edgeopt.runtimes.portable import PortableOnnx

session = PortableOnnx(**json.loads(sys.argv[2])).open(Engine.read(Path(sys.argv[1])), threads=2)
count, prompt = int(sys.argv[3]), [5 + place % 30_000 for place in range(int(sys.argv[4]))]
timed = [(token, time.monotonic()) for token in session.generate(prompt, count, stop_at_end=False)]
taken = [after - before for (_, before), (_, after) in zip(timed, timed[1:])]
told = {"token_s": statistics.median(taken), "cap_bytes": process.memory_cap(), **process.memory()}
told["tokens"] = [token for token, _ in timed]
print(json.dumps(told))
"""


def streaming(folder: Path) -> None:
    """The 246 M shape in fp32 under an enforced cap of 512 MiB, by how much of it stays in memory."""
    from edgeopt.measure.cap import drop_cached, enforced
    from edgeopt.runtimes.portable import graph, shards
    from edgeopt.runtimes.portable.tiers import fitting

    model = folder / "llama246m"
    make_random_llama(model)
    given = ["recipe=baseline", "runtime=onnx", f"runtime.shards={SHARDS}", "runtime.prepacked=false"]
    engine = engine_of(folder, cli(folder, "run", "model=local", f"model.path={model}", *only(), *given))
    found = shards.read(engine)
    ways = [(budget, ahead) for budget in BUDGETS_MIB for ahead in (True, False)]
    told: dict[tuple[int, bool], list[dict[str, Any]]] = {way: [] for way in ways}
    disk = []
    for _ in range(ROUNDS):
        drop_cached(engine)
        disk.append(read_bytes_per_s(engine / graph.WEIGHTS))
        for budget, ahead in ways:
            drop_cached(engine)
            values = {"shards": SHARDS, "prepacked": False, "resident": f"{budget} MiB", "read_ahead": ahead}
            with enforced(CAP_MIB * 2**20) as capped:
                told[budget, ahead].append(generated(engine, values, prompt=16, capped=capped))
    assert all(run["cap_bytes"] == CAP_MIB * 2**20 for runs in told.values() for run in runs)
    rows = []
    for budget in BUDGETS_MIB:
        stay = fitting([shard.size_bytes for shard in found], budget * 2**20)
        streamed = sum(shard.size_bytes for number, shard in enumerate(found) if number not in stay)
        allowed_s = streamed / statistics.median(disk)
        ahead_s, demand_s = (statistics.median(run["token_s"] for run in told[budget, way]) for way in (True, False))
        peak = max(run["peak_rss_bytes"] for way in (True, False) for run in told[budget, way]) / 2**20
        rows.append(
            [
                budget,
                streamed / 1e6,
                1e3 * ahead_s,
                1e3 * demand_s,
                1e3 * allowed_s,
                allowed_s / min(ahead_s, demand_s),
                peak,
            ]
        )
    size, gb_per_s = sum(shard.size_bytes for shard in found) / 1e6, statistics.median(disk) / 1e9
    print(f"{size:.0f} MB are read for a token where nothing stays; the disk gives {gb_per_s:.3g} GB/s\n")
    table(
        [
            "resident, MiB",
            "streamed, MB",
            "read ahead, ms a token",
            "on demand, ms a token",
            "the disk allows, ms",
            "share of that, at best",
            "peak RSS, MiB",
        ],
        rows,
    )


def context(folder: Path) -> None:
    """The 246 M shape at 4 bits with long contexts, by how much of keys and values stays in memory."""
    model = folder / "llama246m"
    make_random_llama(model, max(LENGTHS))
    given = ["recipe=int4", "runtime=onnx", f"runtime.shards={SHARDS}"]
    engine = engine_of(folder, cli(folder, "run", "model=local", f"model.path={model}", *only(), *given))
    rows = []
    for length in LENGTHS:
        told: dict[str, list[dict[str, Any]]] = {budget: [] for budget in KV_BUDGETS}
        for _ in range(ROUNDS):
            for budget in KV_BUDGETS:
                values = {"shards": SHARDS, "kv_resident": budget}
                told[budget].append(generated(engine, values, prompt=length - TOKENS))
        assert len({tuple(run["tokens"]) for runs in told.values() for run in runs}) == 1
        for budget, runs in told.items():
            figures = [statistics.median(run[name] for run in runs) for name in ("peak_rss_bytes", "rss_bytes")]
            token_ms = 1e3 * statistics.median(run["token_s"] for run in runs)
            rows.append([length, budget, *(figure / 2**20 for figure in figures), token_ms])
    print("all generate the same tokens\n")
    table(["context, tokens", "keys and values resident", "peak RSS, MiB", "RSS in the end, MiB", "ms a token"], rows)


def generated(engine: Path, values: dict[str, Any], *, prompt: int, capped: Sequence[str] = ()) -> dict[str, Any]:
    """What a process tells that opens the engine with `values`, reads so many tokens and generates TOKENS."""
    asked = [sys.executable, "-c", GENERATE, str(engine), json.dumps(values), str(TOKENS), str(prompt)]
    found: dict[str, Any] = json.loads(subprocess.check_output([*capped, *asked]))
    return found


def read_bytes_per_s(path: Path) -> float:
    """How fast storage gives a file that no cache has: large reads in order, past the page cache."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        buffer, read, begun = mmap.mmap(-1, BLOCK), 0, time.perf_counter()
        while count := os.preadv(file, [buffer], read):
            read += count
            if count < BLOCK:
                break
        return read / (time.perf_counter() - begun)
    finally:
        os.close(file)
