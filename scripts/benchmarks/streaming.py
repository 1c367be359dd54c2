"""Benchmark of models larger than memory: tokens under an enforced cap against what the disk allows."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import cli, engine_of, figures, intervals, make_random_llama, only, subjects, table

CAP_MIB, SHARDS, TOKENS, ROUNDS = 512, 32, 8, 3
BUDGETS_MIB = (0, 64, 128, 192, 256)
PROMPT, AT_ONCE = 512, (32, 128, 512)
"""Tokens of a prompt, and how many of them are read together."""
STREAMED: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "fp32": (("recipe=baseline",), {"prepacked": False}),
    "4 bits, packed on disk": (("recipe=int4", "step.quantize.symmetric=true"), {"packed_on_disk": True}),
}
LENGTHS = {2048: 3, 8192: 1}
"""Tokens of a context, and how often each way is run with it."""
TIERS: dict[str, dict[str, Any]] = {
    "fp32, all in memory": {"kv_resident": "1 GiB"},
    "fp32, 64 MiB in memory": {"kv_resident": "64 MiB"},
    "fp32, all in a file": {"kv_resident": "0 B"},
    "int8, 64 MiB in memory": {"keys_values": "int8", "kv_resident": "64 MiB"},
    "int4, 64 MiB in memory": {"keys_values": "int4", "kv_resident": "64 MiB"},
    "fp32, window of 1,024": {"kv_window": 1024, "kv_resident": "1 GiB"},
}
"""All without an arena, of which each shard would keep one as large as its intermediate results."""
LOSSLESS = tuple(TIERS)[:3]
LOSSY: dict[str, dict[str, Any]] = {
    "int8": {"keys_values": "int8"},
    "int4": {"keys_values": "int4"},
    "window of 256": {"kv_window": 256},
    "window of 128": {"kv_window": 128},
    "int4, window of 256": {"keys_values": "int4", "kv_window": 256},
}
GENERATE = """
import json, statistics, sys, time
from pathlib import Path
from edgeopt.core.artifact import Engine
from edgeopt.machine import procfs
from edgeopt.runtimes.onnx.runtime import PortableOnnx

session = PortableOnnx(**json.loads(sys.argv[2])).open(Engine.read(Path(sys.argv[1])), threads=2)
count, prompt = int(sys.argv[3]), [5 + place % 30_000 for place in range(int(sys.argv[4]))]
begin = time.monotonic()
timed = [(token, time.monotonic()) for token in session.generate(prompt, count, stop_at_end=False)]
taken = [after - before for (_, before), (_, after) in zip(timed, timed[1:])]
told = {"first_s": timed[0][1] - begin, "token_s": statistics.median(taken), "cap_bytes": procfs.read_memory_cap()}
told |= {"tokens": [token for token, _ in timed], **procfs.read_memory()}
print(json.dumps(told))
"""


def streaming(folder: Path) -> None:
    """The 246 M shape under an enforced cap of 512 MiB, by how much of it stays in memory: fp32, and 4 bits packed."""
    from edgeopt.runtimes.onnx import shards

    model = folder / "llama246m"
    make_random_llama(model)
    chosen = ["model=local", f"model.path={model}", *only(), "runtime=onnx", f"runtime.shards={SHARDS}"]
    for name, (recipe, opened) in STREAMED.items():
        given = [f"runtime.{key}={str(value).lower()}" for key, value in opened.items()]
        engine = engine_of(folder, cli(folder, "run", *chosen, *recipe, *given))
        bytes_per_s, told = _streamed(engine, opened)
        sizes = [shard.size_bytes for shard in shards.read(engine)]
        size = f"{sum(sizes) / 1e6:.0f} MB are read for a token where nothing stays"
        print(f"{name}: {size}; the disk gives {bytes_per_s / 1e9:.3g} GB/s\n")
        rows = [_allowed(sizes, budget, bytes_per_s, told) for budget in BUDGETS_MIB]
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
        table([f"of {PROMPT} tokens, read at once", "first token, ms", "peak RSS, MiB"], _prompts(engine, opened))


def _streamed(engine: Path, opened: dict[str, Any]) -> tuple[float, dict[tuple[int, bool], list[dict[str, Any]]]]:
    """What the disk gives, bytes/s, and what processes tell by budget and whether shards are read ahead."""
    from edgeopt.machine.bandwidth import measure_direct_read_bytes_per_s
    from edgeopt.machine.memory_cap import drop_page_cache
    from edgeopt.runtimes.onnx import graph

    told: dict[tuple[int, bool], list[dict[str, Any]]] = {
        (b, ahead): [] for b in BUDGETS_MIB for ahead in (True, False)
    }
    disk = []
    for _ in range(ROUNDS):
        drop_page_cache(engine)
        disk.append(measure_direct_read_bytes_per_s(engine / graph.WEIGHTS_FILE))
        for (budget, ahead), runs in told.items():
            values = {"resident": f"{budget} MiB", "read_ahead": ahead, **opened}
            runs.append(_capped(engine, values, prompt=16))
    return statistics.median(disk), told


def _allowed(
    sizes: Sequence[int], budget_mib: int, bytes_per_s: float, told: dict[tuple[int, bool], list[dict[str, Any]]]
) -> list[object]:
    from edgeopt.runtimes.onnx.kv_cache_offload import select_resident

    stay = select_resident(sizes, budget_mib * 2**20)
    streamed = sum(size for number, size in enumerate(sizes) if number not in stay)
    allowed_s = streamed / bytes_per_s
    ahead_s, demand_s = (statistics.median(run["token_s"] for run in told[budget_mib, way]) for way in (True, False))
    peak = max(run["peak_rss_bytes"] for way in (True, False) for run in told[budget_mib, way]) / 2**20
    share = allowed_s / min(ahead_s, demand_s)
    return [budget_mib, streamed / 1e6, 1e3 * ahead_s, 1e3 * demand_s, 1e3 * allowed_s, share, peak]


def _prompts(engine: Path, opened: dict[str, Any]) -> list[list[object]]:
    """What a prompt takes where nothing stays in memory, by how much of it is read at once; shards keep no arenas."""
    told: dict[int, list[dict[str, Any]]] = {tokens: [] for tokens in AT_ONCE}
    for _ in range(ROUNDS):
        for tokens, runs in told.items():
            values = {"resident": "0 B", "prompt_tokens": tokens, "arena": False, **opened}
            runs.append(_capped(engine, values, prompt=PROMPT))
    return [
        [
            tokens,
            1e3 * statistics.median(run["first_s"] for run in runs),
            max(run["peak_rss_bytes"] for run in runs) / 2**20,
        ]
        for tokens, runs in told.items()
    ]


def _capped(engine: Path, values: dict[str, Any], *, prompt: int) -> dict[str, Any]:
    """What a process under the cap tells, of whose files nothing is in memory before."""
    from edgeopt.machine.memory_cap import drop_page_cache, enforce_cap

    drop_page_cache(engine)
    with enforce_cap(CAP_MIB * 2**20) as capped:
        told = generated(engine, {"shards": SHARDS, **values}, prompt=prompt, capped=capped)
    assert told["cap_bytes"] == CAP_MIB * 2**20
    return told


def context(folder: Path) -> None:
    """Keys and values of long contexts: what tiers, fewer bits and windows take, and what the lossy ones lose.

    Of the 246 M shape at 4 bits, three runs with 2,048 tokens and one with 8,192.
    """
    model = folder / "llama246m"
    make_random_llama(model, max(LENGTHS))
    given = ["model=local", f"model.path={model}", *only(), "recipe=int4", "runtime=onnx", f"runtime.shards={SHARDS}"]
    forms = {str(values.get("keys_values", "fp32")) for values in TIERS.values()}
    engines = {f: engine_of(folder, cli(folder, "run", *given, f"runtime.keys_values={f}")) for f in sorted(forms)}
    rows = []
    for length, rounds in LENGTHS.items():
        told: dict[str, list[dict[str, Any]]] = {name: [] for name in TIERS}
        for _ in range(rounds):
            for name, values in TIERS.items():
                engine = engines[str(values.get("keys_values", "fp32"))]
                told[name].append(
                    generated(engine, {"shards": SHARDS, "arena": False, **values}, prompt=length - TOKENS)
                )
        lossless = [run["tokens"] for name in LOSSLESS for run in told[name]]
        assert all(tokens == lossless[0] for tokens in lossless)
        for name, runs in told.items():
            peak, last = (statistics.median(run[n] for run in runs) / 2**20 for n in ("peak_rss_bytes", "rss_bytes"))
            rows.append([length, name, peak, last, 1e3 * statistics.median(run["token_s"] for run in runs)])
    print(f"{', '.join(LOSSLESS)}: all generate the same tokens\n")
    table(["context, tokens", "keys and values", "peak RSS, MiB", "RSS in the end, MiB", "ms a token"], rows)
    _losses(folder)


def _losses(folder: Path) -> None:
    """What keys and values in fewer bits or of fewer tokens do to trained models, on windows of their text."""
    rows = []
    for subject in subjects():
        for name, values in LOSSY.items():
            given = [f"runtime.{key}={value}" for key, value in values.items()]
            found = cli(folder, "run", *subject.chosen, "recipe=baseline", "runtime=onnx", *only("quality"), *given)
            low, high = intervals(found, "quality/kl_mean")
            kl, ratio = (figures(found)[metric] for metric in ("quality/kl_mean", "quality/perplexity_ratio"))
            rows.append([subject.title, name, kl, f"{low:.2g} to {high:.2g}", ratio])
    table(["model", "keys and values", "KL to all in fp32, nats", "95 % interval", "perplexity ratio"], rows)


def generated(engine: Path, values: dict[str, Any], *, prompt: int, capped: Sequence[str] = ()) -> dict[str, Any]:
    """What a process tells that opens the engine with `values`, reads so many tokens and generates TOKENS."""
    asked = [sys.executable, "-c", GENERATE, str(engine), json.dumps(values), str(TOKENS), str(prompt)]
    found: dict[str, Any] = json.loads(subprocess.check_output([*capped, *asked]))
    return found
