"""Build engines with other tools, as baselines on the same weights and the same tokens.

ONNX Runtime's builder is installed with edgeopt, llama.cpp with edgeopt[llamacpp]. Olive needs a separate environment
with olive-ai 0.13, onnxruntime-genai 0.14, datasets and requests. Set EDGEOPT_OLIVE_PYTHON to its interpreter.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

OLIVE_PYTHON = "EDGEOPT_OLIVE_PYTHON"


def build_onnx_runtime(model: Path, directory: Path, method: str, *, bits: int = 4, block_size: int = 32) -> None:
    """Build an engine with onnxruntime-genai's own quantizer `method`: `default`, `rtn` or `k_quant`."""
    from onnxruntime_genai.models import builder

    from edgeopt.checkpoints import importing

    spec = importing.spec_of(model)
    options = [
        "hf_token=false",
        "accuracy_level=4",
        f"block_size={block_size}",
        f"algo_config={method}",
        f"shared_embeddings={str(spec.tied_embeddings).lower()}",
        f"op_types_to_quantize={'MatMul/Gather' if spec.tied_embeddings else 'MatMul'}",
    ]
    if bits == 8:
        options.append("matmul_mixed_precision=last_matmul:int8")
    with (
        tempfile.TemporaryDirectory() as scratch,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        parsed = builder.parse_extra_options("", str(model), str(directory), f"int{bits}", "cpu", scratch, options)
        builder.create_model("", str(model), str(directory), f"int{bits}", "cpu", scratch, **parsed)
    seal(model, directory, f"onnxruntime-genai, {method}")


def seal(model: Path, directory: Path, tool: str) -> None:
    """Seal the output of `tool` in `directory` as an engine that edgeopt's probes can measure."""
    from edgeopt.checkpoints import importing, modeling
    from edgeopt.core.artifact import Engine
    from edgeopt.core.config_objects import to_config
    from edgeopt.runtimes.genai import graph_passes
    from edgeopt.runtimes.genai.layout import GENERATION_GRAPH, SCORING_GRAPH
    from edgeopt.runtimes.genai.runtime import Genai

    modeling.copy_model_files(model, directory)
    graph_passes.split_scoring(directory / GENERATION_GRAPH, directory / SCORING_GRAPH)
    made_by = {"runtime": to_config(Genai()), "recipe": {"text": tool}}
    Engine.seal(directory, format=Genai.format, spec=importing.spec_of(model), made_by=made_by)


def has_olive() -> bool:
    """Return whether the interpreter of Olive's environment is set."""
    return OLIVE_PYTHON in os.environ


def has_llama_cpp() -> bool:
    """Return whether llama.cpp is installed."""
    return find_spec("llama_cpp") is not None


def evaluation_windows(model: Path, overrides: Sequence[str]) -> list[list[int]]:
    """Return the windows of token ids that the quality probe evaluates under `overrides`."""
    from edgeopt.config import assemble
    from edgeopt.measure.harness.workload import build_workload

    bound = assemble.build_bench(assemble.Request(overrides=tuple(overrides)).compose())
    return build_workload(
        bound.evaluation,
        model,
        context_length=bound.target.context_length,
        prompt_lengths=bound.bench.prompt_lengths,
        window_tokens=bound.bench.window_tokens,
        max_windows=bound.bench.max_windows,
    ).documents


def calibration_documents(overrides: Sequence[str]) -> Sequence[str]:
    """Return the documents of the calibration text under `overrides`."""
    from edgeopt.config import assemble
    from edgeopt.core.config_objects import canonical_json

    config = assemble.Request(overrides=tuple(overrides)).compose()
    return assemble.load_text(canonical_json(config["calibration"])).documents


def build_llama_cpp(model: Path, directory: Path, weight_type: str) -> None:
    """Build an engine with llama.cpp's own quantizer, for example in Q4_K_M."""
    from edgeopt.checkpoints import importing
    from edgeopt.core.artifact import Engine
    from edgeopt.core.config_objects import to_config
    from edgeopt.runtimes.llamacpp.runtime import LlamaCpp

    runtime = LlamaCpp()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = importing.import_checkpoint(model, Path(scratch))
        quantized = replace(checkpoint, spec=replace(checkpoint.spec, weight_dtype=weight_type))
        runtime.build(quantized, directory, print)
    made_by = {"runtime": to_config(runtime), "recipe": {"text": f"llama.cpp, {weight_type}"}}
    Engine.seal(directory, format=runtime.format, spec=quantized.spec, made_by=made_by)


def build_olive(model: Path, directory: Path, calibration: Sequence[str], *, window_tokens: int) -> None:
    """Build an engine with Olive's GPTQ in 4 bits and its model builder."""
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        (work / "calibration.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in calibration))
        pre_process = {
            "type": "text_generation_huggingface_pre_process",
            "text_cols": ["text"],
            "strategy": "line-by-line",
            "max_seq_len": window_tokens,
            "max_samples": 40,
        }
        data = {
            "name": "calibration",
            "type": "HuggingfaceContainer",
            "load_dataset_config": {"data_name": "json", "data_files": "calibration.jsonl", "split": "train"},
            "pre_process_data_config": pre_process,
        }
        gptq = {
            "type": "Gptq",
            "bits": 4,
            "group_size": 32,
            "sym": False,
            "lm_head": True,
            "data_config": "calibration",
        }
        builder = {
            "type": "ModelBuilder",
            "precision": "int4",
            "int4_block_size": 32,
            "int4_algo_config": "rtn",
        }
        _run_olive(model, work, {"data_configs": [data], "passes": {"quantize": gptq, "export": builder}})
        olive_output = next((work / "out").rglob("model.onnx")).parent
        shutil.copytree(olive_output, directory, dirs_exist_ok=True)
    seal(model, directory, "Olive, Gptq")


def run_olive_search(model: Path, folder: Path, windows: Sequence[Sequence[int]], seed: int) -> list[dict[str, float]]:
    """Run Olive's TPE over the 4-bit options of its model builder.

    Return `perplexity`, `mib` and the seconds `at` of each evaluation.
    """
    (folder / "windows.json").write_text(json.dumps(windows))
    log = folder / "evaluations.jsonl"
    evaluator = {
        "type": "edgeopt_evaluator",
        "user_script": str(Path(__file__).with_name("baseline_olive.py")),
        "type_args": {"windows": str(folder / "windows.json"), "log": str(log)},
        "metrics": [
            {"name": "perplexity", "type": "latency", "sub_types": [{"name": "avg", "priority": 1}]},
            {"name": "mib", "type": "size_on_disk", "sub_types": [{"name": "bytes", "priority": 2}]},
        ],
    }
    builder = {
        "type": "ModelBuilder",
        "precision": "int4",
        "int4_accuracy_level": 4,
        "int4_block_size": [32, 64, 128],
        "int4_algo_config": ["default", "rtn", "k_quant_mixed", "k_quant_last"],
        "int4_is_symmetric": [True, False],
        "int4_op_types_to_quantize": ["MatMul", "Gather"],
        "extra_options": {"shared_embeddings": True},
    }
    config = {
        "evaluators": {"edgeopt": evaluator},
        "evaluator": "edgeopt",
        "search_strategy": {
            "execution_order": "joint",
            "sampler": "tpe",
            "sampler_config": {"max_samples": 24, "seed": seed},
        },
        "passes": {"builder": builder},
    }
    start = time.time()
    _run_olive(model, folder, config)
    evaluations = map(json.loads, log.read_text().splitlines())
    return [{**evaluation, "at": evaluation["at"] - start} for evaluation in evaluations]


def _run_olive(model: Path, folder: Path, config: Mapping[str, Any]) -> None:
    """Run Olive on the CPU in `folder`, with its output in `folder`/out."""
    system = {
        "type": "LocalSystem",
        "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
    }
    common = {
        "input_model": {"type": "HfModel", "model_path": str(model)},
        "systems": {"local": system},
        "host": "local",
        "target": "local",
        "evaluate_input_model": False,
        "cache_dir": "cache",
        "output_dir": "out",
    }
    (folder / "olive.json").write_text(json.dumps(common | dict(config)))
    process = subprocess.run(
        [os.environ[OLIVE_PYTHON], "-m", "olive", "run", "--config", "olive.json"],
        cwd=folder,
        env={**os.environ, "OLIVE_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        raise RuntimeError(f"Olive failed with exit code {process.returncode}: {process.stderr[-2000:]}")
