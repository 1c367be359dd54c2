"""Benchmark compression techniques at equal size, with the quantizers of other tools as baselines."""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path

from benchmarks.common import (
    BenchmarkModel,
    bench_interleaved,
    cli,
    compare,
    engine_folder,
    make_random_llama,
    metrics_of,
    only,
    print_table,
    trained_models,
)

FOUR_BITS = ["step.quantize.lm_head=int4", "step.quantize.embedding=int4", "step.quantize.symmetric=true"]
QAT_TOKENS = "step.qat.tokens=200000"
UNIFORM_RECIPES = {
    "int4, rtn": ["recipe=int4", *FOUR_BITS],
    "int4, k_quant": ["recipe=int4", "rounding=k_quant", *FOUR_BITS],
    "int4, k_quant, bias correction": [
        *("recipe=int4", "rounding=k_quant", *FOUR_BITS, "step.quantize.bias_correction=true"),
    ],
    "int4, hqq": ["recipe=int4", "rounding=hqq", *FOUR_BITS],
    "int4, gptq": ["recipe=int4", "rounding=gptq", *FOUR_BITS],
    "int4, awq and gptq": ["recipe=awq_int4", "rounding=gptq", *FOUR_BITS],
    "int4, gptq and qat": ["recipe=qat_int4", *FOUR_BITS, QAT_TOKENS],
    "int4, gptq, block 64": ["recipe=int4", "rounding=gptq", *FOUR_BITS, "step.quantize.block_size=64"],
}
BITS_PER_WEIGHT = {"reference model": (4.25, 4.5, 5.2), "TinyStories-656K": (4.25, 4.5, 6.95)}
"""Budgets: uniform int4 in blocks of 64 and of 32, and llama.cpp's Q4_K_M on this model."""
ALL_TEXT = "measure.max_windows=1000"


def rounding(folder: Path) -> None:
    """Perplexity of each rounding method at equal size, beside ONNX Runtime, Olive and llama.cpp."""
    for trained in trained_models():
        overrides = [*trained.overrides, ALL_TEXT, *only("quality")]
        base = metrics_of(cli(folder, "run", *overrides, "recipe=baseline"))["quality/perplexity"]
        rows = baseline_rows(trained, folder, overrides)
        mixed = {f"mixed, {bits:g} bits": ["recipe=mixed", _bits(bits)] for bits in BITS_PER_WEIGHT[trained.title]}
        mixed |= {
            f"mixed, {bits:g} bits, and qat": ["recipe=mixed_qat", _bits(bits), QAT_TOKENS]
            for bits in BITS_PER_WEIGHT[trained.title]
        }
        for name, command in (UNIFORM_RECIPES | mixed).items():
            document = cli(folder, "run", *overrides, *command)
            size = weight_size(engine_folder(folder, document))
            rows.append((name, *size, metrics_of(document)["quality/perplexity"]))
        print(f"{trained.title}, perplexity {base:.4g} in fp32\n")
        print_table(
            ["recipe", "kB", "bits per weight", "perplexity", "increase"], [[*row, row[-1] - base] for row in rows]
        )


def _bits(bits: float) -> str:
    return f"step.quantize.bits_per_weight={bits}"


def baseline_rows(trained: BenchmarkModel, folder: Path, overrides: list[str]) -> list[tuple[str, float, float, float]]:
    """Return table rows for the engines of the other tools that are installed."""
    from benchmarks import baselines

    rows: list[tuple[str, float, float, float]] = []

    def evaluate(name: str, engine: Path) -> None:
        metrics = metrics_of(cli(folder, "bench", "--engine", str(engine), *overrides))
        rows.append((name, *weight_size(engine), metrics["quality/perplexity"]))

    for method in ("default", "rtn", "k_quant"):
        engine = Path(tempfile.mkdtemp(dir=folder))
        baselines.build_onnx_runtime(trained.folder, engine, method)
        evaluate(f"ONNX Runtime int4, {method}", engine)
    if baselines.has_olive():
        engine = Path(tempfile.mkdtemp(dir=folder))
        baselines.build_olive(trained.folder, engine, baselines.calibration_documents(overrides), window_tokens=256)
        evaluate("Olive GPTQ int4", engine)
    if baselines.has_llama_cpp():
        for weight_type in ("Q4_0", "Q4_K_M", "Q8_0"):
            engine = Path(tempfile.mkdtemp(dir=folder))
            baselines.build_llama_cpp(trained.folder, engine, weight_type)
            evaluate(f"llama.cpp {weight_type}", engine)
    return rows


def weight_size(engine: Path) -> tuple[float, float]:
    """Return the size of an engine's weights in kB and in bits per weight, including scales and embeddings."""
    from edgeopt.core.artifact import Engine

    weights = engine / "model.onnx.data"
    size_bytes = weights.stat().st_size if weights.is_file() else _gguf_bytes(engine)
    return size_bytes / 1e3, 8 * size_bytes / Engine.read(engine).spec.parameters


def _gguf_bytes(engine: Path) -> int:
    from gguf import GGUFReader

    return sum(int(tensor.n_bytes) for tensor in GGUFReader(engine / "model.gguf").tensors)


def recovery(folder: Path) -> None:
    """Pruning, distillation, LoRA and int4 against int4 alone and a smaller distilled student, at equal size."""
    distill = ["step.distill.tokens=300000", "step.distill.learning_rate=0.001"]
    students = {"reference model": (208, 640), "TinyStories-656K": (112, 288)}
    for trained in trained_models():
        overrides = [*trained.overrides, ALL_TEXT, *only("quality")]
        gptq = [*FOUR_BITS, "rounding=gptq"]
        hidden, width = students[trained.title]
        pruned = [
            *("recipe=prune_distill_int4", "+step@step.lora=lora", "order=[prune,distill,lora,quantize]"),
            *("step.prune.ratio=0.3", "step.lora.rank=16", *distill, *gptq),
        ]
        document = cli(folder, "run", *overrides, *pruned)
        size = weight_size(engine_folder(folder, document))[0]
        commands = {
            "int4": ["recipe=int4", *gptq],
            "mixed int4 and int2": [
                *("recipe=mixed", "step.quantize.bits_per_weight=null", f"step.quantize.size={size:.0f} kB"),
                "step.quantize.block_sizes=[16,32,64,128]",
            ],
            "mixed int4 and int2, QAT": [
                *("recipe=mixed_qat", "step.quantize.bits_per_weight=null", f"step.quantize.size={size:.0f} kB"),
                *("step.quantize.block_sizes=[16,32,64,128]", QAT_TOKENS),
            ],
            "smaller student, distilled, int4": [
                *("recipe=student_distill_int4", f"step.student.hidden_size={hidden}", *gptq, *distill),
                *(f"step.student.intermediate_size={width}", "step.quantize.block_size=16"),
            ],
        }
        rows = [["pruned by 30 %, distilled, LoRA, int4", size, metrics_of(document)["quality/perplexity"]]]
        for name, command in commands.items():
            document = cli(folder, "run", *overrides, *command)
            rows.append(
                [name, weight_size(engine_folder(folder, document))[0], metrics_of(document)["quality/perplexity"]]
            )
        base = metrics_of(cli(folder, "run", *overrides, "recipe=baseline"))["quality/perplexity"]
        print(f"{trained.title}, perplexity {base:.4g} in fp32\n")
        print_table(["recipe", "kB", "perplexity"], rows)


def eight_bits(folder: Path) -> None:
    """8-bit activations with and without SmoothQuant, and key-value caches of 8 and 4 bits, at a context of 512."""
    quality = ("quality/perplexity", "quality/kl_mean")
    activations = ["recipe=baseline", "+step@step.quantize=int8_activations", "order=[quantize]"]
    smooth = ["recipe=smooth_int8"]
    cached = ["recipe=gptq_int4", "+step@step.kv_cache=kv_cache", "order=[quantize,kv_cache]"]
    probes = only("quality", "memory", "latency")
    for trained in trained_models():
        print(f"{trained.title}\n")
        commands = {
            "fp32": ["recipe=baseline"],
            "8-bit weights": ["recipe=int8"],
            "8-bit activations, dynamic": [*activations, "step.quantize.ranges=dynamic"],
            "8-bit activations, static, min-max": [*activations, "step.quantize.ranges=min_max"],
            "8-bit activations, static, min-max, SmoothQuant": [*smooth, "step.quantize.ranges=min_max"],
            "8-bit activations, static, percentile": [*activations, "step.quantize.ranges=percentile"],
            "8-bit activations, static, percentile, SmoothQuant": [*smooth, "step.quantize.ranges=percentile"],
            "int4, cache in fp32": ["recipe=gptq_int4"],
            "int4, cache in 8 bits": cached,
            "int4, cache in 8 bits per tensor": [*cached, "step.kv_cache.per_channel=false"],
            "int4, cache in 4 bits": [*cached, "step.kv_cache.bits=4"],
        }
        compare(folder, {name: [*trained.overrides, *probes, *command] for name, command in commands.items()}, quality)


def time_budget(folder: Path) -> None:
    """Mixed precision under a latency budget beside uniform types: predicted and measured decode latency."""
    cli(folder, "profile", "--name", "here", "--out", str(folder / "here" / "target" / "here.yaml"))
    overrides = ["--config-dir", str(folder / "here"), "target=here", ALL_TEXT, *only("quality")]
    uniform = {
        f"{weights}, blocks of {block}": [
            *(f"recipe={weights}", "rounding=gptq", f"step.quantize.block_size={block}"),
            *("step.quantize.symmetric=true", f"step.quantize.lm_head={weights}", f"step.quantize.embedding={weights}"),
        ]
        for weights, block in (("int4", 32), ("int4", 128), ("int8", 32), ("int8", 128))
    }
    budget_ms = {
        name: cli(folder, "predict", *overrides, *command)["predictions"]["latency/decode_p50_ms"]["value"]
        for name, command in uniform.items()
    }
    commands = dict(uniform)
    for name in uniform:
        mixed = f"mixed, as fast as {name}"
        budget_ms[mixed] = budget_ms[name]
        commands[mixed] = [
            *("recipe=mixed", "step.quantize.block_sizes=[16,32,64,128,256]", "step.quantize.bits_per_weight=null"),
            f"step.quantize.decode='{budget_ms[name]:.6g} ms'",
        ]
    documents = {name: cli(folder, "run", *overrides, *command) for name, command in commands.items()}
    engines = {name: engine_folder(folder, document) for name, document in documents.items()}
    measured = bench_interleaved(folder, engines)
    rows = [
        [
            name,
            weight_size(engine)[0],
            budget_ms[name],
            measured[name]["latency/decode_p50_ms"],
            metrics_of(documents[name])["quality/perplexity"],
        ]
        for name, engine in engines.items()
    ]
    print_table(["recipe", "kB", "predicted or budget ms", "decode p50 ms", "perplexity"], rows)


def effort(folder: Path) -> None:
    """Time and memory of GPTQ and of mixed precision for the 246 M shape, with 32 windows of 256 tokens."""
    model = folder / "llama246m"
    make_random_llama(model)
    overrides = ["model=local", f"model.path={model}", *only()]
    gptq = cli(folder, "run", *overrides, "recipe=gptq_int4", "step.quantize.block_size=128")
    print(f"GPTQ: {gptq['timings_s']['compress/quantize']:.0f} s, peak RSS {peak_gib():.1f} GiB")
    for bits in (4.25, 4.5):
        start = time.perf_counter()
        mixed = cli(folder, "run", *overrides, "recipe=mixed", _bits(bits), "rounding=rtn")
        print(f"mixed precision, {bits} bits: {mixed['timings_s']['compress/quantize']:.0f} s, ", end="")
        print(f"{time.perf_counter() - start:.0f} s in total, peak RSS {peak_gib():.1f} GiB")
    print()


def peak_gib() -> float:
    """Return the largest peak RSS of all commands so far."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
