"""Benchmarks of the runtimes: one model in 4 bits on each, beside what llama.cpp's users would take."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import peers
from bench_common import cli, engine_of, in_turn, make_random_llama, only, table

METRICS = {
    "decode, ms": "latency/decode_p50_ms",
    "512 tokens read, ms": "latency/ttft_512_ms",
    "cold start, ms": "latency/cold_start_ms",
    "peak RSS, MiB": "memory/peak_rss_mib",
    "size, MiB": "size/engine_mib",
}


def runtimes(folder: Path) -> None:
    """The 246 M shape in 4 bits with two threads; ratios are to llama.cpp's Q4_K_M."""
    from edgeopt.artifact import Engine
    from edgeopt.measure.inventory import inventory
    from edgeopt.spec import EMBEDDING

    model = folder / "llama246m"
    make_random_llama(model)
    chosen = ["model=local", f"model.path={model}", *only(), "recipe=int4", "step.quantize.lm_head=int4"]
    symmetric = "step.quantize.symmetric=true"
    recipes = {
        "genai, blocks of 32": ["step.quantize.block_size=32"],
        "genai, blocks of 128": ["step.quantize.block_size=128"],
        "onnx, blocks of 32": ["runtime=onnx", symmetric],
        "onnx, blocks of 128": ["runtime=onnx", symmetric, "step.quantize.block_size=128"],
    }
    engines = {}
    if peers.llama_cpp_runs_here():
        for kind in ("Q4_K_M", "Q4_0"):
            engines[f"llama.cpp, {kind}"] = Path(tempfile.mkdtemp(dir=folder))
            peers.llama_cpp(model, engines[f"llama.cpp, {kind}"], kind)
        recipes["llamacpp, blocks of 32"] = ["runtime=llamacpp", symmetric, "step.quantize.embedding=int4"]
    for name, recipe in recipes.items():
        engines[name] = engine_of(folder, cli(folder, "run", *chosen, *recipe))
    gb_per_s = statistics.median(inventory(rates=True).read_gb_per_s for _ in range(3))
    measured = in_turn(folder, engines, target=["measure.prompt_lengths=[16,512]", "target.threads=2"])
    first = next(iter(measured.values()))
    rows = []
    for name, found in measured.items():
        told = [f"{found[metric]:.4g} ({found[metric] / first[metric]:.2f})" for metric in METRICS.values()]
        spec = Engine.read(engines[name]).spec
        read_ms = sum(map(spec.size_bytes, spec.matrices.keys() - {EMBEDDING})) / gb_per_s / 1e6
        rows.append([name, *told, f"{read_ms / found['latency/decode_p50_ms']:.2f}" if spec.grids else ""])
    print(f"{gb_per_s:.3g} GB/s are read\n")
    table(["engine", *METRICS, "share of the roofline"], rows)
