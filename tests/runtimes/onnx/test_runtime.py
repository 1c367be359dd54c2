"""Test that portable ONNX engines match PyTorch for every decoder family, opset and weight type."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support.stages import apply_step, build_engine

from edgeopt.compress.quantization.int8 import Int8
from edgeopt.compress.quantization.quantize import Quantize
from edgeopt.core.artifact import Checkpoint, Engine
from edgeopt.errors import BuildError, ConfigError
from edgeopt.measure.stats.divergence import relative_error
from edgeopt.runtimes.genai.runtime import Genai
from edgeopt.runtimes.onnx import graph
from edgeopt.runtimes.onnx.runtime import PortableOnnx
from runtimes.onnx.random_models import ALL_FAMILIES, import_random_checkpoint, prune_unevenly, torch_logits
from runtimes.test_families import PROMPT

QUICK = ("gpt2", "opt", "gpt_neox", "llama", "qwen3", "gemma3")
"""Families tested in every run. The others are marked `slow`."""


def build(checkpoint: Checkpoint, directory: Path, **options: Any) -> Engine:
    runtime = PortableOnnx(**options)
    runtime.check(checkpoint.spec)
    return build_engine(runtime, checkpoint, directory)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in ALL_FAMILIES]
)
def test_family_matches_pytorch_and_generates(family: str, tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = import_random_checkpoint(family, tiny_model, tmp_path)
    engine = build(checkpoint, tmp_path / "engine")
    session = PortableOnnx().open(engine, threads=1)
    assert relative_error(torch_logits(checkpoint), session.logits(PROMPT)) < 1e-4
    tokens = list(PROMPT)
    for token in session.generate(PROMPT, 4, stop_at_end=False):
        scores = torch_logits(checkpoint, tokens)[-1]
        assert scores[token] >= np.sort(scores)[-3]  # generation excludes end tokens
        tokens.append(token)
    assert len(tokens) == len(PROMPT) + 4
    assert PortableOnnx().lint(engine) == []


@pytest.mark.parametrize("opset", [20, 18, 17])
def test_older_opset_is_written_and_matches_pytorch(opset: int, llama: Checkpoint, tmp_path: Path) -> None:
    engine = build(llama, tmp_path / "engine", opset=opset)
    imports = onnx.load(engine.directory / graph.GRAPH_FILE, load_external_data=False).opset_import
    assert {entry.domain: entry.version for entry in imports}[""] == opset
    assert relative_error(torch_logits(llama), PortableOnnx().open(engine, threads=1).logits(PROMPT)) < 1e-4


def test_unsupported_opset_is_rejected() -> None:
    with pytest.raises(ConfigError, match="`opset` must be one of 23, 20, 18, 17; got 19"):
        PortableOnnx(opset=19)


@pytest.mark.parametrize(
    ("options", "opset", "message"),
    [
        ({"weights": "int2"}, 23, "weights of 4 or 8 bits, got 2 bits"),
        ({}, 20, "`opset` must be at least 21 for quantized weights, got 20"),
    ],
)
def test_weights_unsupported_by_onnx_are_rejected(
    options: dict[str, Any], opset: int, message: str, llama: Checkpoint
) -> None:
    with pytest.raises(ConfigError, match=message):
        PortableOnnx(opset=opset).check(Quantize(**options).plan(llama.spec))


def test_unevenly_pruned_layers_match_pytorch(llama: Checkpoint, tmp_path: Path) -> None:
    pruned = prune_unevenly(llama, tmp_path / "pruned")
    logits = PortableOnnx().open(build(pruned, tmp_path / "engine"), threads=1).logits(PROMPT)
    assert relative_error(torch_logits(pruned), logits) < 1e-4


def test_batch_matches_single_sequences(llama: Checkpoint, fp32_engine: Engine) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(fp32_engine.directory / graph.GRAPH_FILE, providers=["CPUExecutionProvider"])
    sequences = [PROMPT[:9], PROMPT[20:29]]
    empty = np.zeros((2, 2, 16, 16), np.float32)
    past = {value.name: empty for value in session.get_inputs() if value.name.startswith(graph.PAST_PREFIX)}
    inputs = {graph.INPUT_IDS: np.array(sequences), graph.PAST_LENGTH: np.array(0), graph.ROWS: np.arange(9)}
    inputs[graph.POSITION] = np.array(0)
    batch = session.run([graph.LOGITS], {**inputs, **past})[0]
    for tokens, logits in zip(sequences, batch, strict=True):
        assert relative_error(torch_logits(llama, tokens), logits) < 1e-4


def test_fp16_weights_are_smaller_and_match_pytorch(llama: Checkpoint, fp32_engine: Engine, tmp_path: Path) -> None:
    source = apply_step(Quantize(weights="fp16"), llama, tmp_path / "source")
    engine = build(source, tmp_path / "engine")
    logits = PortableOnnx().open(engine, threads=1).logits(PROMPT)
    assert relative_error(torch_logits(source), logits) < 1e-3
    assert engine.size_bytes < 0.75 * fp32_engine.size_bytes


def test_missing_provider_requires_cpu_fallback(fp32_engine: Engine) -> None:
    with pytest.raises(BuildError, match=r"cuda is not available on this machine; CPUExecutionProvider is.*GPU build"):
        PortableOnnx(provider="cuda").open(fp32_engine, threads=1)
    session = PortableOnnx(provider="cuda", cpu_fallback=True).open(fp32_engine, threads=1)
    assert tuple(session.backends) == ("CPUExecutionProvider",)


def test_damaged_graph_is_rejected(fp32_engine: Engine, tmp_path: Path) -> None:
    shutil.copytree(fp32_engine.directory, tmp_path / "engine")
    path = tmp_path / "engine" / graph.GRAPH_FILE
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BuildError, match="the engine cannot be opened"):
        PortableOnnx().open(replace(fp32_engine, directory=tmp_path / "engine"), threads=1)


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(Quantize(weights="int4", symmetric=True), marks=pytest.mark.slow),
        Quantize(weights="int4", lm_head="int4", embedding="int4"),
        pytest.param(
            Quantize(weights="int8", bias_correction=True, windows=2, window_tokens=32), marks=pytest.mark.slow
        ),
        pytest.param(Int8(), marks=pytest.mark.slow),
        Int8(ranges="min_max", windows=2, window_tokens=32),
    ],
    ids=["int4 symmetric", "int4 tables", "int8 with biases", "int8 inputs, dynamic", "int8 inputs, static"],
)
def test_quantized_engine_matches_genai_and_is_smaller(
    step: Any, llama: Checkpoint, fp32_engine: Engine, tmp_path: Path
) -> None:
    source = apply_step(step, llama, tmp_path / "source")
    engine = build(source, tmp_path / "engine")
    session = PortableOnnx().open(engine, threads=1)
    genai_engine = build_engine(Genai(), source, tmp_path / "genai")
    expected = Genai().open(genai_engine, threads=1).logits(PROMPT)
    assert relative_error(expected, session.logits(PROMPT)) < 0.05
    assert len(list(session.generate(PROMPT[:20], 5, stop_at_end=False))) == 5
    assert engine.size_bytes < fp32_engine.size_bytes
    assert PortableOnnx().lint(engine) == []
