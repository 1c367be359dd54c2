"""Test that engines of each decoder family compute like PyTorch, with random checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.stages import build_engine, compression_context

from edgeopt.checkpoints import modeling, safetensors_io
from edgeopt.checkpoints.importing import import_checkpoint
from edgeopt.cli.main import main
from edgeopt.compress.pruning.prune_depth import PruneDepth
from edgeopt.compress.pruning.prune_heads import PruneHeads
from edgeopt.compress.pruning.prune_width import PruneWidth
from edgeopt.compress.pruning.student import Student
from edgeopt.compress.quantization.awq import Awq
from edgeopt.compress.quantization.quantize import Quantize
from edgeopt.compress.quantization.smooth_quant import SmoothQuant
from edgeopt.core.artifact import Checkpoint, Engine
from edgeopt.core.corpus import Text
from edgeopt.runtimes.genai.runtime import Genai

PROMPT = [2 + 7 * i % 290 for i in range(160)]
"""A prompt longer than a prefill chunk and than every sliding window below."""
CALIBRATION = Text(name="calibration", documents=("def read(path):\n    return open(path).read()\n" * 60,))
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + 0.5 * i for i in range(8)],
    "partial_rotary_factor": 0.5,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 3": ("Llama", {"rope_parameters": LLAMA_3}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "gemma2": ("Gemma2", {"sliding_window": 64}),
    "gemma3": (
        "Gemma3",
        {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "phi3": ("Phi3", {"original_max_position_embeddings": 256}),
    "phi4": (
        "Phi3",
        {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "original_max_position_embeddings": 64,
            "rope_parameters": LONG_ROPE,
        },
    ),
    "granite": ("Granite", {"num_key_value_heads": 4}),
}


@pytest.fixture(scope="module")
def families(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: random_checkpoint(kind, values, tiny_model, tmp_path_factory.mktemp(name))
        for name, (kind, values) in FAMILIES.items()
    }


def random_checkpoint(kind: str, values: dict[str, Any], tokenizer: Path, folder: Path) -> Path:
    import torch
    import transformers

    name = f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config"
    config = getattr(transformers, name)(**{**SHAPE, **values})
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / file, folder / file)
    return folder


def build(checkpoint: Checkpoint, directory: Path) -> Engine:
    runtime = Genai()
    runtime.check(checkpoint.spec)
    return build_engine(runtime, checkpoint, directory)


def logits(engine: Engine) -> np.ndarray:
    session = Genai().open(engine, threads=1)
    try:
        return session.logits(PROMPT)
    finally:
        session.close()


def torch_logits(checkpoint: Checkpoint) -> np.ndarray:
    import torch

    logits: np.ndarray = modeling.load(checkpoint)(torch.tensor([PROMPT])).logits[0].numpy()
    return logits


def apply(step: Any, checkpoint: Checkpoint, directory: Path) -> Checkpoint:
    directory.mkdir()
    spec = step.apply(checkpoint, directory, compression_context(checkpoint, CALIBRATION))
    return Checkpoint.seal(directory, format="checkpoint-1", spec=spec, made_by={})


FUSED_FAMILIES = ("phi3", "phi4")
"""Families with fused projections, which cannot be pruned yet."""


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest, families: dict[str, Path], tmp_path: Path) -> Checkpoint:
    (tmp_path / "in").mkdir()
    return import_checkpoint(families[request.param], tmp_path / "in")


@pytest.mark.parametrize("checkpoint", FAMILIES, indirect=True)
def test_engine_matches_torch(checkpoint: Checkpoint, tmp_path: Path) -> None:
    expected = torch_logits(checkpoint)
    engine_logits = logits(build(checkpoint, tmp_path / "engine"))
    assert np.abs(engine_logits - expected).max() < 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("checkpoint", ["llama 3", "gemma3", "phi3"], indirect=True)
def test_engine_stores_no_rotary_tables(checkpoint: Checkpoint, tmp_path: Path) -> None:
    import onnx

    engine = build(checkpoint, tmp_path / "engine")
    stored = [tensor.name for tensor in onnx.load(engine.directory / "model.onnx").graph.initializer]
    assert not [name for name in stored if name in ("cos_cache", "sin_cache", "cos_cache_local", "cos_cache_global")]


@pytest.mark.parametrize("checkpoint", [f for f in FAMILIES if f not in FUSED_FAMILIES], indirect=True)
def test_pruned_engine_matches_torch(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for step in (PruneWidth(ratio=0.25), PruneDepth(layers=1), PruneHeads(ratio=0.5)):
        checkpoint = apply(step, checkpoint, tmp_path / type(step).__name__)
    expected = torch_logits(checkpoint)
    engine_logits = logits(build(checkpoint, tmp_path / "engine"))
    assert np.abs(engine_logits - expected).max() < 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("checkpoint", [f for f in FAMILIES if f not in FUSED_FAMILIES], indirect=True)
def test_student_engine_matches_torch(checkpoint: Checkpoint, tmp_path: Path) -> None:
    step = Student(layers=2, hidden_size=48, intermediate_size=96, windows=2, window_tokens=64)
    student = apply(step, checkpoint, tmp_path / "student")
    expected = torch_logits(student)
    assert student.spec.hidden_size == 48
    engine_logits = logits(build(student, tmp_path / "engine"))
    assert np.abs(engine_logits - expected).max() < 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("checkpoint", FAMILIES, indirect=True)
def test_int8_engine_is_close_to_torch_and_fast(checkpoint: Checkpoint, tmp_path: Path) -> None:
    quantized = apply(Quantize(weights="int8", lm_head="int8", embedding="int8"), checkpoint, tmp_path / "quantized")
    engine, expected = build(quantized, tmp_path / "int8"), torch_logits(checkpoint)
    engine_logits = logits(engine)
    assert (engine_logits * expected).sum() / np.sqrt((engine_logits**2).sum() * (expected**2).sum()) > 0.98
    assert Genai().lint(engine) == []


@pytest.mark.parametrize("checkpoint", ["qwen2", "gemma3", "phi3"], indirect=True)
def test_engine_uses_corrected_biases(checkpoint: Checkpoint, tmp_path: Path) -> None:
    step = Quantize(weights="int8", block_size=64, bias_correction=True, windows=2, window_tokens=64)
    quantized = apply(step, checkpoint, tmp_path / "quantized")
    biases = [name for name in safetensors_io.read_folder(quantized.directory) if name.endswith("proj.bias")]
    assert len(biases) == 3 * (4 if checkpoint.spec.architecture == "Phi3ForCausalLM" else 7)
    engine_logits, expected = logits(build(quantized, tmp_path / "engine")), torch_logits(quantized)
    assert np.abs(engine_logits - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize(
    "step",
    [Awq(block_size=16, powers=3, windows=2, window_tokens=32), SmoothQuant(alpha=0.5, windows=2, window_tokens=32)],
    ids=["awq", "smooth_quant"],
)
@pytest.mark.parametrize("checkpoint", FAMILIES, indirect=True)
def test_channel_scaling_preserves_logits(step: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    expected = torch_logits(checkpoint)
    scaled = apply(step, checkpoint, tmp_path / "scaled")
    (report,) = (scaled.directory / "artifacts").glob("*.json")
    assert any(json.loads(report.read_text()).values()), "nothing was scaled"
    scaled_logits = torch_logits(scaled)
    assert np.abs(scaled_logits - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("checkpoint", ["gemma3"], indirect=True)
def test_generation_shorter_than_sliding_window(checkpoint: Checkpoint, tmp_path: Path) -> None:
    session = Genai().open(build(checkpoint, tmp_path / "engine"), threads=1)
    assert len(list(session.generate(PROMPT[:5], 6, stop_at_end=False))) == 6
    session.close()


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_recipe_runs_end_to_end(
    family: str,
    families: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = ["recipe=prune_lora_int4", "step.prune.ratio=0.25", "step.lora.rank=4", "step.lora.tokens=2048"]
    fast = ["measure.prompt_lengths=[16]", "measure.max_windows=2", "measure.window_tokens=64"]
    disabled = [f"measure.probes.{name}=null" for name in ("energy", "latency", "memory")]
    limits = ["limits.size.engine_mib=1 MiB"]
    assert (
        main(
            [
                "run",
                "model=local",
                f"model.path={families[family]}",
                *recipe,
                *fast,
                *disabled,
                "target.context_length=96",
                *limits,
                "--json",
            ]
        )
        == 0
    )
    document = json.loads(capsys.readouterr().out)
    metrics = {m["metric"]: m["value"] for m in document["measurements"]}
    assert document["feasible"]
    assert metrics["quality/perplexity"] > 1
    assert metrics["size/engine_mib"] < 1
