"""Test adapters of genai engines on float and quantized matrices, and updates of fused matrices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import adapter_checkpoints
from support.stages import apply_step, build_engine

from edgeopt.checkpoints import adapters, modeling
from edgeopt.checkpoints.adapters import LowRankUpdate
from edgeopt.checkpoints.importing import import_checkpoint
from edgeopt.cli.main import main
from edgeopt.compress.quantization.int8 import Int8
from edgeopt.compress.quantization.kv_cache import KvCache
from edgeopt.compress.quantization.quantize import Quantize
from edgeopt.core.artifact import Checkpoint
from edgeopt.core.protocols import Step
from edgeopt.errors import BuildError
from edgeopt.measure.stats.divergence import relative_error
from edgeopt.runtimes.genai.adapters import export, slice_stacked_updates
from edgeopt.runtimes.genai.layout import adapter_path
from edgeopt.runtimes.genai.runtime import Genai
from runtimes.test_families import FAMILIES, random_checkpoint

PROMPT = [2 + 7 * i % 290 for i in range(40)]
RUNTIME = Genai(accuracy_level=1)


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    ranks=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    cut=st.tuples(st.integers(0, 20), st.integers(0, 20)),
)
def test_sliced_update_equals_rows_of_stacked_weights(sizes: list[int], ranks: list[int], cut: tuple[int, int]) -> None:
    """Rank 0 denotes a matrix without an update."""
    parts = [
        (rows, LowRankUpdate(down=torch.randn(rank, 6), up=torch.randn(rows, rank)) if rank else None)
        for rows, rank in zip(sizes, ranks, strict=False)
    ]
    start, stop = sorted(min(edge, sum(sizes)) for edge in cut)
    stacked_weight = torch.cat([torch.zeros(rows, 6) if update is None else update.weight for rows, update in parts])
    update = slice_stacked_updates(parts, start, stop - start)
    if update is None:
        assert not stacked_weight[start:stop].any()
    else:
        torch.testing.assert_close(update.weight, stacked_weight[start:stop])


def assert_matches_torch(checkpoint: Checkpoint, directory: Path, tolerance: float = 1e-3) -> None:
    """Assert that the engine's logits match PyTorch with the adapter r4, without it, and with it again."""
    session, network = Genai().open(build_engine(RUNTIME, checkpoint, directory), threads=1), modeling.load(checkpoint)
    for name in ("r4", None, "r4"):
        updates = adapters.read(checkpoint.directory, name) if name else {}
        with torch.no_grad(), adapters.attached(network, updates):
            expected = network(torch.tensor([PROMPT])).logits[0].numpy()
        assert relative_error(expected, session.logits(PROMPT, adapter=name)) < tolerance
    session.close()


@pytest.mark.parametrize(
    ("step", "tolerance"),
    [
        (Quantize(weights="int4"), 1e-3),
        (Quantize(weights="int8", overrides={"layers.0.*": "float"}), 1e-3),
        (Quantize(weights="fp16"), 2e-3),
        (Int8(), 0.05),
    ],
    ids=["int4", "int8 and float", "fp16", "dynamic inputs"],
)
def test_adapter_on_quantized_base_matches_torch(
    step: Step, tolerance: float, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    quantized = apply_step(step, checkpoint, tmp_path / "quantized")
    assert_matches_torch(
        adapter_checkpoints.add_adapter(quantized, tmp_path / "adapted", "r4"), tmp_path / "engine", tolerance
    )


@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_adapter_with_biases_and_fused_projections_matches_torch(family: str, tiny_model: Path, tmp_path: Path) -> None:
    for folder in ("source", "in"):
        (tmp_path / folder).mkdir()
    source = import_checkpoint(random_checkpoint(*FAMILIES[family], tiny_model, tmp_path / "source"), tmp_path / "in")
    assert_matches_torch(adapter_checkpoints.add_adapter(source, tmp_path / "adapted", "r4"), tmp_path / "engine")


def test_adapter_works_with_int8_kv_cache(checkpoint: Checkpoint, tmp_path: Path) -> None:
    adapted = adapter_checkpoints.add_adapter(checkpoint, tmp_path / "adapted", "r4")
    quantized = apply_step(KvCache(windows=4, window_tokens=64), adapted, tmp_path / "quantized")
    assert adapters.read(quantized.directory, "r4").keys() == adapters.read(adapted.directory, "r4").keys()
    assert_matches_torch(quantized, tmp_path / "engine", 0.1)


def test_adapter_is_engine_file_and_lint_finding(checkpoint: Checkpoint, tmp_path: Path) -> None:
    engine = build_engine(
        RUNTIME,
        adapter_checkpoints.add_adapter(checkpoint, tmp_path / "adapted", "r4", targets=("o_proj",)),
        tmp_path / "engine",
    )
    assert "adapters/r4.onnx_adapter" in {record.path for record in engine.files}
    (finding,) = Genai().lint(engine)
    assert finding.startswith("2 × matrix with an adapter branch")
    added = (engine.directory / adapter_path("r4")).stat().st_size
    assert 0 <= added - engine.spec.adapter_bytes("r4") < 2000


def test_update_without_graph_input_is_rejected(checkpoint: Checkpoint, tmp_path: Path) -> None:
    engine = build_engine(RUNTIME, checkpoint, tmp_path / "engine")
    update = LowRankUpdate(down=torch.zeros(2, 64), up=torch.zeros(64, 2))
    with pytest.raises(BuildError, match=r"no input .* for adapter 'lost'"):
        export({"lost": {"/model/layers.0/attn/o_proj/MatMul": update}}, engine.directory)


def test_adapter_recipe_runs_end_to_end(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = ["model=local", f"model.path={tiny_model}", "recipe=int4_adapter", "step.lora.rank=4"]
    recipe += ["step.lora.tokens=4096", "step.lora.learning_rate=0.02", "measure.prompt_lengths=[16]"]
    fast = ["measure.max_windows=2", "measure.window_tokens=64", "target.context_length=96"]
    disabled = [f"measure.probes.{name}=null" for name in ("energy", "latency", "memory")]

    assert main(["run", *recipe, *fast, *disabled, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    metrics = {m["metric"]: m["value"] for m in document["measurements"]}
    assert metrics["quality/perplexity_ratio"] < 0.95, "the base model's ratio is above 1"
    engine = document["engine"]["directory"]
    assert main(["generate", engine, "--prompt", "def", "--adapter", "default", "--json"]) == 0
