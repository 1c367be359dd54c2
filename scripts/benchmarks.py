"""Benchmarks of edgeopt, through the commands that a user types; run by scripts/bench.

    scripts/bench                 all
    scripts/bench startup width   some

Figures are medians; what is compared is interleaved in one run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

EDGEOPT = str(Path(sys.executable).with_name("edgeopt"))


def cli(folder: Path, *arguments: str) -> dict[str, Any]:
    """The JSON document that a command prints; what it says on stderr is shown as it comes."""
    done = subprocess.run([EDGEOPT, *arguments, "--json"], cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def figures(document: dict[str, Any]) -> dict[str, float]:
    return {m["metric"]: m["value"] for m in document["measurements"]}


def intervals(document: dict[str, Any], metric: str) -> tuple[float, float]:
    found = next(m for m in document["measurements"] if m["metric"] == metric)
    return found["low"], found["high"]


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row) + " |")
    print(flush=True)


def startup(folder: Path) -> None:
    """Time until `edgeopt --help` has printed."""
    times = []
    for _ in range(11):
        begun = time.perf_counter()
        subprocess.run([EDGEOPT, "--help"], stdout=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - begun)
    print(f"`edgeopt --help`: median {statistics.median(times):.3f} s of {len(times)}\n")


def width(folder: Path) -> None:
    """What pruning 30 % of the MLP channels costs and gains, and what LoRA wins back."""
    ratio = "step.prune.ratio=0.3"
    commands = {
        "uncompressed": ["recipe=baseline"],
        "30 % narrower": ["recipe=prune", ratio],
        "30 % narrower, LoRA": ["recipe=prune_lora", ratio, "step.lora.rank=16"],
        "int4": ["recipe=int4"],
        "30 % narrower, LoRA, int4": ["recipe=prune_lora_int4", ratio, "step.lora.rank=16"],
    }
    compare(folder, commands)
    perplexity = [figures(cli(folder, "run", *commands[n]))["quality/perplexity"] for n in list(commands)[:3]]
    base, cut, won = perplexity
    print(f"perplexity lost by pruning {cut - base:.3f}, won back {cut - won:.3f}: {(cut - won) / (cut - base):.0%}\n")


def width_246m(folder: Path) -> None:
    """The same cut of a 246 M Llama shape with random weights, where arithmetic outweighs the calls around it."""
    model = folder / "llama246m"
    make_random_llama(model)
    whole = ["model=local", f"model.path={model}", "measure.probes.parity=null", "measure.max_windows=2"]
    compare(
        folder,
        {
            "uncompressed": [*whole, "recipe=baseline"],
            "30 % narrower": [*whole, "recipe=prune", "step.prune.ratio=0.3", "step.prune.windows=4"],
        },
    )


def compare(folder: Path, commands: dict[str, list[str]], rounds: int = 3) -> None:
    """A table of recipes: built and judged once, then timed in turn; ratios are to the first."""
    documents = {name: cli(folder, "run", *command) for name, command in commands.items()}
    off = [f"measure.probes.{name}=null" for name in ("quality", "continuations", "parity", "energy")]
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, document in documents.items():
            engine = str(folder / document["engine"]["directory"])
            measured[name].append(figures(cli(folder, "bench", "--engine", engine, *off)))

    def median(name: str, metric: str) -> float:
        return statistics.median(found[metric] for found in measured[name])

    shown = ("size/engine_mib", "latency/decode_p50_ms", "latency/ttft_256_ms", "memory/peak_rss_mib")
    first = next(iter(commands))
    rows = []
    for name, document in documents.items():
        values = [median(name, metric) for metric in shown]
        ratios = [
            f"{value:.4g} ({value / median(first, metric):.2f})" for metric, value in zip(shown, values, strict=True)
        ]
        rows.append([name, *ratios, figures(document)["quality/perplexity"]])
    table(["recipe", *shown, "perplexity"], rows)


REALDATA = Path(__file__).parents[2] / "shared" / "realdata"
FOUR_BITS = ["step.quantize.lm_head=int4", "step.quantize.embedding=int4", "step.quantize.symmetric=true"]
ROUNDINGS = {
    "int4, rtn": ["recipe=int4", *FOUR_BITS],
    "int4, k_quant": ["recipe=int4", "rounding=k_quant", *FOUR_BITS],
    "int4, hqq": ["recipe=int4", "rounding=hqq", *FOUR_BITS],
    "int4, gptq": ["recipe=int4", "rounding=gptq", *FOUR_BITS],
    "int4, awq and gptq": ["recipe=awq_int4", "rounding=gptq", *FOUR_BITS],
    "int4, gptq and qat": ["recipe=qat_int4", *FOUR_BITS, "step.qat.tokens=200000"],
    "mixed, 4.25 bits": ["recipe=mixed", "step.quantize.bits_per_weight=4.25"],
    "int4, gptq, block 64": ["recipe=int4", "rounding=gptq", *FOUR_BITS, "step.quantize.block_size=64"],
    "mixed, 4.5 bits": ["recipe=mixed", "step.quantize.bits_per_weight=4.5"],
    "mixed, 7 bits": ["recipe=mixed", "step.quantize.bits_per_weight=7"],
}


def rounding(folder: Path) -> None:
    """Perplexity at equal bytes of every way of rounding, beside ONNX Runtime's own."""
    from peers import onnx_runtime

    import edgeopt

    models = {"reference model": (Path(edgeopt.__file__).parent / "reference", [])}
    stories = REALDATA / "TinyStories-656K"
    if stories.is_dir():
        texts = [
            f"text@{use}=file {use}.path={REALDATA / 'tinystories' / use}.jsonl"
            for use in ("calibration", "evaluation")
        ]
        whole = ["model=local", f"model.path={stories}", "measure.max_windows=1000", *" ".join(texts).split()]
        models["TinyStories-656K"] = (stories, whole)
    off = [f"measure.probes.{name}=null" for name in ("latency", "memory", "energy", "parity", "continuations")]
    for title, (model, chosen) in models.items():
        base = figures(cli(folder, "run", *chosen, "recipe=baseline", *off))["quality/perplexity"]
        rows = []
        for method in ("default", "rtn", "k_quant"):
            engine = Path(tempfile.mkdtemp(dir=folder))
            onnx_runtime(model, engine, method)
            found = figures(cli(folder, "bench", "--engine", str(engine), *chosen, *off))
            rows.append([f"ONNX Runtime int4, {method}", *weighed(engine), found["quality/perplexity"]])
        for name, command in ROUNDINGS.items():
            document = cli(folder, "run", *chosen, *command, *off)
            engine = folder / document["engine"]["directory"]
            rows.append([name, *weighed(engine), figures(document)["quality/perplexity"]])
        print(f"{title}, perplexity {base:.4g} in fp32\n")
        table(
            ["recipe", "kB of weights", "bits per weight", "perplexity", "increase"], [[*r, r[-1] - base] for r in rows]
        )


def weighed(engine: Path) -> tuple[float, float]:
    """kB of an engine's weights, and bits of each, with scales and tables."""
    from edgeopt.artifact import Engine

    stored = (engine / "model.onnx.data").stat().st_size
    return stored / 1e3, 8 * stored / Engine.read(engine).spec.parameters


def agreement(folder: Path) -> None:
    """Whether two measurements of one engine agree, and both orders of two engines give the same verdict."""
    first = cli(folder, "run", "recipe=int8")["engine"]["directory"]
    second = cli(folder, "run", "recipe=int4")["engine"]["directory"]
    order = [first, first, second, second, first]
    bench = [cli(folder, "bench", "--engine", str(folder / engine)) for engine in order]
    timed = [
        m["metric"] for m in bench[0]["measurements"] if m["metric"].startswith(("latency/", "memory/", "throughput/"))
    ]
    rows = []
    for metric in timed:
        (a_low, a_high), (b_low, b_high) = intervals(bench[0], metric), intervals(bench[1], metric)
        overlap = a_low <= b_high and b_low <= a_high
        rows.append(
            [metric, f"{a_low:.4g} … {a_high:.4g}", f"{b_low:.4g} … {b_high:.4g}", "agree" if overlap else "DIFFER"]
        )
    table(["metric", "first", "second", ""], rows)
    metric = "latency/decode_p50_ms"
    forth = figures(bench[1])[metric] < figures(bench[2])[metric]
    back = figures(bench[4])[metric] < figures(bench[3])[metric]
    print(f"int8 faster than int4: {forth} when measured first, {back} when measured last\n")


def memory(folder: Path) -> None:
    """Peak memory against bytes on disk of a 246 M Llama shape with random weights, int4, by length of the context."""
    model = folder / "llama246m"
    make_random_llama(model)
    whole = ["model=local", f"model.path={model}", "recipe=int4", "step.quantize.block_size=128"]
    off = [f"measure.probes.{name}=null" for name in ("energy", "parity", "quality", "continuations")]
    in_8_bits = ["+step@step.kv_cache=kv_cache", "order=[quantize,kv_cache]"]
    rows = []
    for tokens, extra in ((640, []), (1024, []), (1024, in_8_bits)):
        f = figures(cli(folder, "run", *whole, *extra, *off, f"target.context_length={tokens}"))
        size, peak = f["size/engine_mib"], f["memory/peak_rss_mib"]
        cache = "8 bits" if extra else "fp32"
        rows.append([tokens, cache, size, peak, peak / size, f["latency/decode_p50_ms"]])
    table(["context", "key-value cache", "engine MiB", "peak RSS MiB", "ratio", "decode p50 ms"], rows)


def make_random_llama(folder: Path) -> None:
    """Hidden 1024, MLP 2816, 16 layers, 16 heads, 4 KV heads, vocabulary 32,000; the reference model's tokenizer."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import edgeopt

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(edgeopt.__file__).parent / "reference" / name, folder / name)


def overhead(folder: Path) -> None:
    """Share of a trial's time, and of the whole sweep's, that is neither compression, build nor measurement."""
    from mlflow import MlflowClient

    begun = time.perf_counter()
    document = cli(folder, "sweep", "search.study=overhead", "search.trials=8", "promote=null")
    passed = time.perf_counter() - begun
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    in_trials = in_stages = 0.0
    for trial in document["trials"]:
        run = client.get_run(trial["run_id"]).info
        in_trials += (run.end_time - run.start_time) / 1e3
        result = json.loads((folder / ".edgeopt/studies/overhead/trials" / f"{trial['number']}.json").read_text())
        in_stages += sum(result["timings_s"].values())
    print(f"8 trials: {in_trials:.0f} s, of which {1 - in_stages / in_trials:.1%} are outside their stages")
    print(f"sweep: {passed:.0f} s, of which {1 - in_stages / passed:.1%} are outside stages, start and end included\n")


BENCHMARKS: dict[str, Callable[[Path], None]] = {
    function.__name__: function for function in (startup, rounding, width, width_246m, agreement, memory, overhead)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *BENCHMARKS], default=list(BENCHMARKS), metavar="NAME")
    for name in parser.parse_args().names:
        print(f"## {name}: {(BENCHMARKS[name].__doc__ or '').strip()}\n", flush=True)
        with tempfile.TemporaryDirectory(prefix="edgeopt-bench-") as folder:
            BENCHMARKS[name](Path(folder))


if __name__ == "__main__":
    main()
