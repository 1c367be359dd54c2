"""Benchmark models and contexts that exceed memory, under an enforced memory cap."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import (
    cli,
    engine_folder,
    interval_of,
    make_random_llama,
    metrics_of,
    only,
    print_table,
    trained_models,
)

CAP_MIB, SHARDS, NEW_TOKENS, ROUNDS = 512, 32, 8, 3
BUDGETS_MIB = (0, 64, 128, 192, 256)
PROMPT_TOKENS, CHUNK_SIZES = 512, (32, 128, 512)
"""Length of a prompt, and values of the session option `prompt_tokens`."""
STREAMED: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "fp32": (("recipe=baseline",), {"prepacked": False}),
    "4 bits, packed on disk": (("recipe=int4", "step.quantize.symmetric=true"), {"packed_on_disk": True}),
}
"""Overrides and session options of each streamed engine."""
CONTEXT_ROUNDS = {2048: 3, 8192: 1}
"""Number of runs by context length."""
CACHES: dict[str, dict[str, Any]] = {
    "fp32, all in memory": {"kv_resident": "1 GiB"},
    "fp32, 64 MiB in memory": {"kv_resident": "64 MiB"},
    "fp32, all in a file": {"kv_resident": "0 B"},
    "int8, 64 MiB in memory": {"keys_values": "int8", "kv_resident": "64 MiB"},
    "int4, 64 MiB in memory": {"keys_values": "int4", "kv_resident": "64 MiB"},
    "fp32, window of 1,024": {"kv_window": 1024, "kv_resident": "1 GiB"},
}
"""Session options of each key-value cache. All run without an arena, because every shard would have a large one."""
LOSSLESS_CACHES = tuple(CACHES)[:3]
LOSSY_CACHES: dict[str, dict[str, Any]] = {
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
count, prompt = int(sys.argv[3]), [5 + index % 30_000 for index in range(int(sys.argv[4]))]
start = time.monotonic()
timed = [(token, time.monotonic()) for token in session.generate(prompt, count, stop_at_end=False)]
intervals = [after - before for (_, before), (_, after) in zip(timed, timed[1:])]
report = {"first_s": timed[0][1] - start, "token_s": statistics.median(intervals)}
report |= {"cap_bytes": procfs.read_memory_cap(), "tokens": [token for token, _ in timed], **procfs.read_memory()}
print(json.dumps(report))
"""
"""A process that opens an engine, generates, and prints its timings and memory."""


def streaming(folder: Path) -> None:
    """Token latency of a 246 M model under a cap of 512 MiB, by memory budget: fp32, and 4 bits packed on disk."""
    from edgeopt.runtimes.onnx import shards

    model = folder / "llama246m"
    make_random_llama(model)
    overrides = ["model=local", f"model.path={model}", *only(), "runtime=onnx", f"runtime.shards={SHARDS}"]
    for name, (recipe, options) in STREAMED.items():
        runtime = [f"runtime.{key}={str(value).lower()}" for key, value in options.items()]
        engine = engine_folder(folder, cli(folder, "run", *overrides, *recipe, *runtime))
        bytes_per_s, reports = _run_streamed(engine, options)
        sizes = [shard.size_bytes for shard in shards.read(engine)]
        size = f"{sum(sizes) / 1e6:.0f} MB are read per token without a budget"
        print(f"{name}: {size}; the disk reads {bytes_per_s / 1e9:.3g} GB/s\n")
        rows = [_compare_with_disk(sizes, budget, bytes_per_s, reports) for budget in BUDGETS_MIB]
        print_table(
            [
                "resident, MiB",
                "streamed, MB",
                "read ahead, ms/token",
                "on demand, ms/token",
                "disk limit, ms/token",
                "disk limit / best",
                "peak RSS, MiB",
            ],
            rows,
        )
        print_table(
            [f"prompt_tokens, prompt of {PROMPT_TOKENS}", "first token, ms", "peak RSS, MiB"],
            _run_prompts(engine, options),
        )


def _run_streamed(engine: Path, options: dict[str, Any]) -> tuple[float, dict[tuple[int, bool], list[dict[str, Any]]]]:
    """Return the disk's bandwidth in bytes/s, and the reports of all rounds by (budget in MiB, read_ahead)."""
    from edgeopt.machine.bandwidth import measure_direct_read_bytes_per_s
    from edgeopt.machine.memory_cap import drop_page_cache
    from edgeopt.runtimes.onnx import graph

    reports: dict[tuple[int, bool], list[dict[str, Any]]] = {
        (budget, read_ahead): [] for budget in BUDGETS_MIB for read_ahead in (True, False)
    }
    bandwidths = []
    for _ in range(ROUNDS):
        drop_page_cache(engine)
        bandwidths.append(measure_direct_read_bytes_per_s(engine / graph.WEIGHTS_FILE))
        for (budget, read_ahead), rounds in reports.items():
            session_options = {"resident": f"{budget} MiB", "read_ahead": read_ahead, **options}
            rounds.append(_generate_capped(engine, session_options, prompt_tokens=16))
    return statistics.median(bandwidths), reports


def _compare_with_disk(
    sizes: Sequence[int],
    budget_mib: int,
    bytes_per_s: float,
    reports: dict[tuple[int, bool], list[dict[str, Any]]],
) -> list[object]:
    """Return the table row of a budget: measured latencies and the minimum time that the disk needs."""
    from edgeopt.runtimes.onnx.kv_cache_offload import select_resident

    resident = select_resident(sizes, budget_mib * 2**20)
    streamed_bytes = sum(size for index, size in enumerate(sizes) if index not in resident)
    limit_s = streamed_bytes / bytes_per_s
    rounds = {read_ahead: reports[budget_mib, read_ahead] for read_ahead in (True, False)}
    ahead_s, demand_s = (statistics.median(run["token_s"] for run in runs) for runs in rounds.values())
    peak_mib = max(run["peak_rss_bytes"] for runs in rounds.values() for run in runs) / 2**20
    ratio = limit_s / min(ahead_s, demand_s)
    return [budget_mib, streamed_bytes / 1e6, 1e3 * ahead_s, 1e3 * demand_s, 1e3 * limit_s, ratio, peak_mib]


def _run_prompts(engine: Path, options: dict[str, Any]) -> list[list[object]]:
    """Return latency and memory of a long prompt by chunk size, with all weights streamed and no arenas."""
    reports: dict[int, list[dict[str, Any]]] = {size: [] for size in CHUNK_SIZES}
    for _ in range(ROUNDS):
        for size, runs in reports.items():
            session_options = {"resident": "0 B", "prompt_tokens": size, "arena": False, **options}
            runs.append(_generate_capped(engine, session_options, prompt_tokens=PROMPT_TOKENS))
    return [
        [
            size,
            1e3 * statistics.median(run["first_s"] for run in runs),
            max(run["peak_rss_bytes"] for run in runs) / 2**20,
        ]
        for size, runs in reports.items()
    ]


def _generate_capped(engine: Path, options: dict[str, Any], *, prompt_tokens: int) -> dict[str, Any]:
    """Return the report of a process under the memory cap, started with a cold page cache."""
    from edgeopt.machine.memory_cap import drop_page_cache, enforce_cap

    drop_page_cache(engine)
    with enforce_cap(CAP_MIB * 2**20) as prefix:
        report = generate(engine, {"shards": SHARDS, **options}, prompt_tokens=prompt_tokens, prefix=prefix)
    assert report["cap_bytes"] == CAP_MIB * 2**20
    return report


def context(folder: Path) -> None:
    """Memory and latency of long contexts with an offloaded, quantized or windowed key-value cache, and its error.

    The 246 M shape at 4 bits, three runs with 2,048 tokens and one with 8,192.
    """
    model = folder / "llama246m"
    make_random_llama(model, max(CONTEXT_ROUNDS))
    overrides = ["model=local", f"model.path={model}", *only(), "recipe=int4"]
    overrides += ["runtime=onnx", f"runtime.shards={SHARDS}"]
    cache_types = sorted({str(options.get("keys_values", "fp32")) for options in CACHES.values()})
    engines = {
        name: engine_folder(folder, cli(folder, "run", *overrides, f"runtime.keys_values={name}"))
        for name in cache_types
    }
    rows = []
    for length, rounds in CONTEXT_ROUNDS.items():
        reports: dict[str, list[dict[str, Any]]] = {name: [] for name in CACHES}
        for _ in range(rounds):
            for name, options in CACHES.items():
                engine = engines[str(options.get("keys_values", "fp32"))]
                session_options = {"shards": SHARDS, "arena": False, **options}
                reports[name].append(generate(engine, session_options, prompt_tokens=length - NEW_TOKENS))
        lossless = [run["tokens"] for name in LOSSLESS_CACHES for run in reports[name]]
        assert all(tokens == lossless[0] for tokens in lossless)
        for name, runs in reports.items():
            peak, last = (statistics.median(run[n] for run in runs) / 2**20 for n in ("peak_rss_bytes", "rss_bytes"))
            rows.append([length, name, peak, last, 1e3 * statistics.median(run["token_s"] for run in runs)])
    print(f"{', '.join(LOSSLESS_CACHES)}: generated tokens are equal\n")
    print_table(["context, tokens", "key-value cache", "peak RSS, MiB", "final RSS, MiB", "ms/token"], rows)
    _print_cache_losses(folder)


def _print_cache_losses(folder: Path) -> None:
    """Print the divergence that quantized and windowed caches cause in trained models."""
    rows = []
    for trained in trained_models():
        for name, options in LOSSY_CACHES.items():
            runtime = [f"runtime.{key}={value}" for key, value in options.items()]
            overrides = [*trained.overrides, "recipe=baseline", "runtime=onnx", *only("quality"), *runtime]
            document = cli(folder, "run", *overrides)
            low, high = interval_of(document, "quality/kl_mean")
            kl, ratio = (metrics_of(document)[metric] for metric in ("quality/kl_mean", "quality/perplexity_ratio"))
            rows.append([trained.title, name, kl, f"{low:.2g} to {high:.2g}", ratio])
    print_table(["model", "key-value cache", "KL from fp32, nats", "95 % interval", "perplexity ratio"], rows)


def generate(
    engine: Path, options: dict[str, Any], *, prompt_tokens: int, prefix: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the report of a process that opens the engine, reads a prompt and generates `NEW_TOKENS` tokens.

    Args:
        prefix: command that starts the process, such as one that caps its memory.
    """
    process = [sys.executable, "-c", GENERATE, str(engine), json.dumps(options), str(NEW_TOKENS), str(prompt_tokens)]
    report: dict[str, Any] = json.loads(subprocess.check_output([*prefix, *process]))
    return report
