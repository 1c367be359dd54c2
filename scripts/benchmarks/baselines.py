"""What users of other tools would run instead, on the same weights and the same tokens.

ONNX Runtime's builder comes with edgeopt, llama.cpp with edgeopt[llamacpp]. Olive wants an environment of its own: name
its interpreter in EDGEOPT_OLIVE_PYTHON (olive-ai 0.13 with onnxruntime-genai 0.14, datasets, requests).
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
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

YARDSTICKS = Path(__file__).parents[2] / "shared" / "peers"
OLIVE = "EDGEOPT_OLIVE_PYTHON"


def onnx_runtime(model: Path, directory: Path, method: str, *, bits: int = 4, block_size: int = 32) -> None:
    """onnxruntime-genai's builder with its own quantizer: `default`, `rtn` or `k_quant`; tied tables are shared."""
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


def seal(model: Path, directory: Path, made_by: str) -> None:
    """Make what another tool built in `directory` an engine that edgeopt's probes measure."""
    from edgeopt.checkpoints import importing, modeling
    from edgeopt.core.artifact import Engine
    from edgeopt.core.config_objects import to_config
    from edgeopt.runtimes.genai import graph_passes
    from edgeopt.runtimes.genai.runtime import GENERATION_GRAPH, SCORING_GRAPH, Genai

    modeling.carry(model, directory)
    graph_passes.split_scoring(directory / GENERATION_GRAPH, directory / SCORING_GRAPH)
    about = {"runtime": to_config(Genai()), "recipe": {"text": made_by}}
    Engine.seal(directory, format=Genai.format, spec=importing.spec_of(model), made_by=about)


def olive_runs_here() -> bool:
    return OLIVE in os.environ and YARDSTICKS.is_dir()


def llama_cpp_runs_here() -> bool:
    return find_spec("llama_cpp") is not None


def evaluation_windows(model: Path, chosen: Sequence[str]) -> list[list[int]]:
    """The windows of token ids that the quality probe reads under the overrides `chosen`."""
    from edgeopt.config import assemble
    from edgeopt.measure.harness.workload import build_workload

    bound = assemble.bench(assemble.Request(overrides=tuple(chosen)).compose())
    return build_workload(
        bound.evaluation,
        model,
        context_length=bound.target.context_length,
        prompt_lengths=bound.bench.prompt_lengths,
        window_tokens=bound.bench.window_tokens,
        max_windows=bound.bench.max_windows,
    ).documents


def calibration(chosen: Sequence[str]) -> Sequence[str]:
    """The documents of the calibration text under the overrides `chosen`."""
    from edgeopt.config import assemble
    from edgeopt.core.config_objects import canonical_json

    config = assemble.Request(overrides=tuple(chosen)).compose()
    return assemble.text(canonical_json(config["calibration"])).documents


def llama_cpp(model: Path, directory: Path, kind: str) -> None:
    """What llama.cpp's own quantizer makes of a model, for example in Q4_K_M, as an engine in `directory`."""
    from edgeopt.checkpoints import importing
    from edgeopt.core.artifact import Engine
    from edgeopt.core.config_objects import to_config
    from edgeopt.runtimes.llamacpp.runtime import LlamaCpp

    runtime = LlamaCpp()
    with tempfile.TemporaryDirectory() as taken:
        checkpoint = importing.import_checkpoint(model, Path(taken))
        rounded = replace(checkpoint, spec=replace(checkpoint.spec, weight_dtype=kind))
        runtime.build(rounded, directory, print)
    about = {"runtime": to_config(runtime), "recipe": {"text": f"llama.cpp, {kind}"}}
    Engine.seal(directory, format=runtime.format, spec=rounded.spec, made_by=about)


def olive(model: Path, directory: Path, calibration: Sequence[str], *, window_tokens: int) -> None:
    """Olive's Gptq in 4 bits and its model builder, as an engine in `directory`."""
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        (work / "calib.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in calibration))
        config = json.loads((YARDSTICKS / "olive_gptq.json").read_text())
        config["input_model"]["model_path"] = str(model)
        config["data_configs"][0]["pre_process_data_config"]["max_seq_len"] = window_tokens
        (work / "olive.json").write_text(json.dumps(config))
        _run(os.environ[OLIVE], "-m", "olive", "run", "--config", "olive.json", folder=work)
        built = next((work / "olout").rglob("model.onnx")).parent
        shutil.copytree(built, directory, dirs_exist_ok=True)
    seal(model, directory, "Olive, Gptq")


def olive_search(model: Path, folder: Path, windows: Sequence[Sequence[int]], seed: int) -> list[dict[str, float]]:
    """What Olive's TPE finds over its model builder's own choices in 4 bits: `perplexity`, `mib`, and seconds `at`."""
    (folder / "windows.json").write_text(json.dumps(windows))
    told = folder / "told.jsonl"
    judge = {
        "type": "judge",
        "user_script": str(Path(__file__).with_name("peer_olive.py")),
        "type_args": {"windows": str(folder / "windows.json"), "told": str(told)},
        "metrics": [
            {"name": "perplexity", "type": "latency", "sub_types": [{"name": "avg", "priority": 1}]},
            {"name": "mib", "type": "size_on_disk", "sub_types": [{"name": "bytes", "priority": 2}]},
        ],
    }
    here = {"type": "LocalSystem", "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}]}
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
        "input_model": {"type": "HfModel", "model_path": str(model)},
        "systems": {"here": here},
        "host": "here",
        "target": "here",
        "evaluators": {"judge": judge},
        "evaluator": "judge",
        "evaluate_input_model": False,
        "search_strategy": {
            "execution_order": "joint",
            "sampler": "tpe",
            "sampler_config": {"max_samples": 24, "seed": seed},
        },
        "passes": {"builder": builder},
        "cache_dir": "cache",
        "output_dir": "out",
    }
    (folder / "olive.json").write_text(json.dumps(config))
    begun = time.time()
    _run(os.environ[OLIVE], "-m", "olive", "run", "--config", "olive.json", folder=folder)
    found = map(json.loads, told.read_text().splitlines())
    return [{**figures, "at": figures["at"] - begun} for figures in found]


def _run(python: str, *arguments: Any, folder: Path | None = None) -> str:
    where = folder or Path(arguments[-1]).parent
    quiet = {**os.environ, "OLIVE_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [python, *map(str, arguments)], cwd=where, env=quiet, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{arguments[0]} failed: {done.stderr[-2000:]}")
    return done.stdout
