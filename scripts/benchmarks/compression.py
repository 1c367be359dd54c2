"""Benchmarks of compression: what each technique loses at equal bytes, beside what people use today."""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path

from benchmarks.common import (
    ProbeContext,
    cli,
    compare,
    engine_of,
    figures,
    in_turn,
    make_random_llama,
    only,
    subjects,
    table,
)

FOUR_BITS = ["step.quantize.lm_head=int4", "step.quantize.embedding=int4", "step.quantize.symmetric=true"]
TRAINED = "step.qat.tokens=200000"
UNIFORM = {
    "int4, rtn": ["recipe=int4", *FOUR_BITS],
    "int4, k_quant": ["recipe=int4", "rounding=k_quant", *FOUR_BITS],
    "int4, k_quant, biases corrected": [
        *("recipe=int4", "rounding=k_quant", *FOUR_BITS, "step.quantize.bias_correction=true"),
    ],
    "int4, hqq": ["recipe=int4", "rounding=hqq", *FOUR_BITS],
    "int4, gptq": ["recipe=int4", "rounding=gptq", *FOUR_BITS],
    "int4, awq and gptq": ["recipe=awq_int4", "rounding=gptq", *FOUR_BITS],
    "int4, gptq and qat": ["recipe=qat_int4", *FOUR_BITS, TRAINED],
    "int4, gptq, block 64": ["recipe=int4", "rounding=gptq", *FOUR_BITS, "step.quantize.block_size=64"],
}
BUDGETS = {"reference model": (4.25, 4.5, 5.2), "TinyStories-656K": (4.25, 4.5, 6.95)}
"""Bits per weight: those of uniform int4 in blocks of 64 and of 32, and those of llama.cpp's Q4_K_M on this model."""
ALL_TEXT = "measure.max_windows=1000"


def rounding(folder: Path) -> None:
    """Perplexity at equal bytes of every way of rounding, beside ONNX Runtime, Olive and llama.cpp."""
    for subject in subjects():
        chosen = [*subject.chosen, ALL_TEXT, *only("quality")]
        base = figures(cli(folder, "run", *chosen, "recipe=baseline"))["quality/perplexity"]
        rows = peers_of(subject, folder, chosen)
        mixed = {f"mixed, {bits:g} bits": ["recipe=mixed", _bits(bits)] for bits in BUDGETS[subject.title]}
        mixed |= {
            f"mixed, {bits:g} bits, and qat": ["recipe=mixed_qat", _bits(bits), TRAINED]
            for bits in BUDGETS[subject.title]
        }
        for name, command in (UNIFORM | mixed).items():
            document = cli(folder, "run", *chosen, *command)
            rows.append([name, *weighed(engine_of(folder, document)), figures(document)["quality/perplexity"]])
        print(f"{subject.title}, perplexity {base:.4g} in fp32\n")
        table(["recipe", "kB", "bits per weight", "perplexity", "increase"], [[*r, r[-1] - base] for r in rows])


def _bits(bits: float) -> str:
    return f"step.quantize.bits_per_weight={bits}"


def peers_of(subject: ProbeContext, folder: Path, chosen: list[str]) -> list[list[object]]:
    """Rows of what users of other tools would take, as far as these run here."""
    from benchmarks import baselines

    rows: list[list[object]] = []

    def judge(name: str, engine: Path) -> None:
        found = figures(cli(folder, "bench", "--engine", str(engine), *chosen))
        rows.append([name, *weighed(engine), found["quality/perplexity"]])

    for method in ("default", "rtn", "k_quant"):
        engine = Path(tempfile.mkdtemp(dir=folder))
        baselines.onnx_runtime(subject.folder, engine, method)
        judge(f"ONNX Runtime int4, {method}", engine)
    if baselines.olive_runs_here():
        engine = Path(tempfile.mkdtemp(dir=folder))
        baselines.olive(subject.folder, engine, baselines.calibration(chosen), window_tokens=256)
        judge("Olive Gptq int4", engine)
    if baselines.llama_cpp_runs_here():
        for kind in ("Q4_0", "Q4_K_M", "Q8_0"):
            engine = Path(tempfile.mkdtemp(dir=folder))
            baselines.llama_cpp(subject.folder, engine, kind)
            judge(f"llama.cpp {kind}", engine)
    return rows


def weighed(engine: Path) -> tuple[float, float]:
    """kB of an engine's weights, and bits of each, with scales and tables."""
    from edgeopt.core.artifact import Engine

    graph = engine / "model.onnx.data"
    stored = graph.stat().st_size if graph.is_file() else _gguf_bytes(engine)
    return stored / 1e3, 8 * stored / Engine.read(engine).spec.parameters


def _gguf_bytes(engine: Path) -> int:
    from gguf import GGUFReader

    return sum(int(tensor.n_bytes) for tensor in GGUFReader(engine / "model.gguf").tensors)


def recovery(folder: Path) -> None:
    """Cutting, distilling, LoRA and int4 against int4 alone and against a smaller dense student, at equal bytes."""
    taught = ["step.distill.tokens=300000", "step.distill.learning_rate=0.001"]
    students = {"reference model": (208, 640), "TinyStories-656K": (112, 288)}
    for subject in subjects():
        chosen = [*subject.chosen, ALL_TEXT, *only("quality")]
        gptq = [*FOUR_BITS, "rounding=gptq"]
        hidden, width = students[subject.title]
        cut = [
            *("recipe=prune_distill_int4", "+step@step.lora=lora", "order=[prune,distill,lora,quantize]"),
            *("step.prune.ratio=0.3", "step.lora.rank=16", *taught, *gptq),
        ]
        document = cli(folder, "run", *chosen, *cut)
        size = weighed(engine_of(folder, document))[0]
        commands = {
            "int4": ["recipe=int4", *gptq],
            "int4 and int2 in as many bytes": [
                *("recipe=mixed", "step.quantize.bits_per_weight=null", f"step.quantize.size={size:.0f} kB"),
                "step.quantize.block_sizes=[16,32,64,128]",
            ],
            "the same, and qat": [
                *("recipe=mixed_qat", "step.quantize.bits_per_weight=null", f"step.quantize.size={size:.0f} kB"),
                *("step.quantize.block_sizes=[16,32,64,128]", TRAINED),
            ],
            "a smaller student, distilled, int4": [
                *("recipe=student_distill_int4", f"step.student.hidden_size={hidden}", *gptq, *taught),
                *(f"step.student.intermediate_size={width}", "step.quantize.block_size=16"),
            ],
        }
        rows = [["30 % narrower, distilled, LoRA, int4", size, figures(document)["quality/perplexity"]]]
        for name, command in commands.items():
            document = cli(folder, "run", *chosen, *command)
            rows.append([name, weighed(engine_of(folder, document))[0], figures(document)["quality/perplexity"]])
        base = figures(cli(folder, "run", *chosen, "recipe=baseline"))["quality/perplexity"]
        print(f"{subject.title}, perplexity {base:.4g} in fp32\n")
        table(["recipe", "kB", "perplexity"], rows)


def eight_bits(folder: Path) -> None:
    """8-bit inputs with and without SmoothQuant, and keys and values in 8 and 4 bits, at a context of 512."""
    judged = ("quality/perplexity", "quality/kl_mean")
    inputs = ["recipe=baseline", "+step@step.quantize=int8_activations", "order=[quantize]"]
    smooth = ["recipe=smooth_int8"]
    cached = ["recipe=gptq_int4", "+step@step.kv_cache=kv_cache", "order=[quantize,kv_cache]"]
    off = only("quality", "memory", "latency")
    for subject in subjects():
        print(f"{subject.title}\n")
        commands = {
            "fp32": ["recipe=baseline"],
            "8-bit weights": ["recipe=int8"],
            "8-bit inputs, ranges of each call": [*inputs, "step.quantize.ranges=dynamic"],
            "static, min-max": [*inputs, "step.quantize.ranges=min_max"],
            "static, min-max, SmoothQuant": [*smooth, "step.quantize.ranges=min_max"],
            "static, percentile": [*inputs, "step.quantize.ranges=percentile"],
            "static, percentile, SmoothQuant": [*smooth, "step.quantize.ranges=percentile"],
            "int4, cache in fp32": ["recipe=gptq_int4"],
            "int4, cache in 8 bits": cached,
            "int4, cache in 8 bits by tensor": [*cached, "step.kv_cache.per_channel=false"],
            "int4, cache in 4 bits": [*cached, "step.kv_cache.bits=4"],
        }
        compare(folder, {name: [*subject.chosen, *off, *command] for name, command in commands.items()}, judged)


def time_budget(folder: Path) -> None:
    """Mixed precision within a time of each token beside single types: what was predicted and what is measured."""
    cli(folder, "profile", "--name", "here", "--out", str(folder / "here" / "target" / "here.yaml"))
    chosen = ["--config-dir", str(folder / "here"), "target=here", ALL_TEXT, *only("quality")]
    single = {
        f"{kind}, blocks of {block}": [
            *(f"recipe={kind}", "rounding=gptq", f"step.quantize.block_size={block}"),
            *("step.quantize.symmetric=true", f"step.quantize.lm_head={kind}", f"step.quantize.embedding={kind}"),
        ]
        for kind, block in (("int4", 32), ("int4", 128), ("int8", 32), ("int8", 128))
    }
    allowed_ms = {
        name: cli(folder, "estimate", *chosen, *command)["figures"]["latency/decode_p50_ms"]["value"]
        for name, command in single.items()
    }
    commands = dict(single)
    for name in single:
        within = f"mixed, as fast as {name}"
        allowed_ms[within] = allowed_ms[name]
        commands[within] = [
            *("recipe=mixed", "step.quantize.block_sizes=[16,32,64,128,256]", "step.quantize.bits_per_weight=null"),
            f"step.quantize.decode='{allowed_ms[name]:.6g} ms'",
        ]
    documents = {name: cli(folder, "run", *chosen, *command) for name, command in commands.items()}
    engines = {name: engine_of(folder, document) for name, document in documents.items()}
    measured = in_turn(folder, engines)
    rows = [
        [
            name,
            weighed(engine)[0],
            allowed_ms[name],
            measured[name]["latency/decode_p50_ms"],
            figures(documents[name])["quality/perplexity"],
        ]
        for name, engine in engines.items()
    ]
    table(["recipe", "kB", "predicted or allowed ms", "decode p50 ms", "perplexity"], rows)


def effort(folder: Path) -> None:
    """Time of GPTQ and of an allocation for the 246 M shape, 32 windows of 256 tokens, and who pays it again."""
    model = folder / "llama246m"
    make_random_llama(model)
    off = only()
    whole = ["model=local", f"model.path={model}", *off]
    gptq = cli(folder, "run", *whole, "recipe=gptq_int4", "step.quantize.block_size=128")
    print(f"GPTQ: {gptq['timings_s']['compress/quantize']:.0f} s, at most {peak_gib():.1f} GiB in the whole run")
    for bits in (4.25, 4.5):
        begun = time.perf_counter()
        mixed = cli(folder, "run", *whole, "recipe=mixed", _bits(bits), "rounding=rtn")
        print(f"mixed precision, {bits} bits: {mixed['timings_s']['compress/quantize']:.0f} s, ", end="")
        print(f"{time.perf_counter() - begun:.0f} s in all, at most {peak_gib():.1f} GiB")
    print()


def peak_gib() -> float:
    """Largest peak RSS of any command run so far."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
