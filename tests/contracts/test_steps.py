"""Contract of the Step protocol, tested for every compression step."""

import json
from pathlib import Path

import pytest
import torch
from support.stages import compression_context

from edgeopt.checkpoints import modeling
from edgeopt.checkpoints.importing import import_checkpoint
from edgeopt.compress.pruning.prune_depth import PruneDepth
from edgeopt.compress.pruning.prune_gradually import PruneGradually
from edgeopt.compress.pruning.prune_heads import PruneHeads
from edgeopt.compress.pruning.prune_width import PruneWidth
from edgeopt.compress.pruning.sparsify import Sparsify
from edgeopt.compress.pruning.student import Student
from edgeopt.compress.pruning.taylor import Taylor
from edgeopt.compress.pruning.wanda import Wanda
from edgeopt.compress.quantization.awq import Awq
from edgeopt.compress.quantization.gptq import Gptq
from edgeopt.compress.quantization.hqq import Hqq
from edgeopt.compress.quantization.int8 import Int8
from edgeopt.compress.quantization.k_quant import KQuant
from edgeopt.compress.quantization.kv_cache import KvCache
from edgeopt.compress.quantization.llama_quantize import LlamaQuantize
from edgeopt.compress.quantization.mixed_precision import MixedPrecision
from edgeopt.compress.quantization.quantize import Quantize
from edgeopt.compress.quantization.smooth_quant import SmoothQuant
from edgeopt.compress.recovery.distill import Distill
from edgeopt.compress.recovery.lora import Lora
from edgeopt.core.artifact import Checkpoint
from edgeopt.core.config_objects import instantiate, to_config
from edgeopt.core.corpus import Text
from edgeopt.errors import ConfigError

STEPS = {
    "prune_width": PruneWidth(ratio=0.25, windows=4, window_tokens=64),
    "prune_width uniform": PruneWidth(ratio=0.25, distribution="uniform", windows=4, window_tokens=64),
    "prune_width global by taylor": PruneWidth(
        ratio=0.25, distribution="global", importance=Taylor(), windows=4, window_tokens=64
    ),
    "prune_width by wanda": PruneWidth(ratio=0.25, importance=Wanda(), windows=4, window_tokens=64),
    "prune_heads": PruneHeads(ratio=0.5, windows=4, window_tokens=64),
    "prune_heads by wanda": PruneHeads(ratio=0.5, importance=Wanda(), windows=4, window_tokens=64),
    "prune_depth": PruneDepth(layers=1, windows=4, window_tokens=64),
    "prune_depth by taylor": PruneDepth(layers=1, importance=Taylor(), windows=4, window_tokens=64),
    "prune_gradually": PruneGradually(
        prune=PruneWidth(ratio=0.5, distribution="uniform", windows=2, window_tokens=64),
        retrain=Distill(tokens=128, batch_tokens=128, window_tokens=64),
        round_ratio=0.25,
        max_perplexity_ratio=None,
    ),
    "prune_gradually by depth": PruneGradually(
        prune=PruneDepth(layers=1, windows=2, window_tokens=64),
        retrain=Lora(rank=2, tokens=128, batch_tokens=128, window_tokens=64),
        max_perplexity_ratio=None,
    ),
    "student": Student(layers=1, hidden_size=48, intermediate_size=96, kv_heads=1, windows=4, window_tokens=64),
    "sparsify": Sparsify(windows=4, window_tokens=64),
    "sparsify by wanda": Sparsify(pattern="unstructured", method="wanda", ratio=0.3, windows=4, window_tokens=64),
    "lora": Lora(rank=2, tokens=256, batch_tokens=128, window_tokens=64),
    "lora rank-stabilized and decomposed": Lora(
        rank=2, rank_stabilized=True, decomposed=True, tokens=256, batch_tokens=128, window_tokens=64
    ),
    "lora unmerged": Lora(rank=2, merge=False, tokens=256, batch_tokens=128, window_tokens=64),
    "distill": Distill(tokens=256, batch_tokens=128, window_tokens=64, hidden_weight=0.5),
    "awq": Awq(windows=4, window_tokens=64, powers=4, block_size=16),
    "gptq": Quantize(weights="int4", block_size=16, rounding=Gptq(), windows=4, window_tokens=64),
    "k_quant": Quantize(weights="int4", block_size=16, rounding=KQuant(), windows=4, window_tokens=64),
    "k_quant with bias correction": Quantize(
        weights="int4", block_size=16, rounding=KQuant(), bias_correction=True, windows=4, window_tokens=64
    ),
    "hqq": Quantize(weights="int4", block_size=16, rounding=Hqq()),
    "mixed_precision": MixedPrecision(
        bits_per_weight=5.0, block_sizes=(16, 32), windows=4, window_tokens=64, candidates=2
    ),
    "int8_activations": Int8(ranges="min_max", windows=4, window_tokens=64),
    "smooth_quant": SmoothQuant(windows=4, window_tokens=64, tokens=64),
    "kv_cache": KvCache(windows=4, window_tokens=64),
    "int4": Quantize(weights="int4", embedding="int8"),
    "int8": Quantize(weights="int8", embedding="int8"),
    "llama_quantize": LlamaQuantize(windows=4, window_tokens=64),
    "fp16": Quantize(weights="fp16"),
    "fp32": Quantize(weights="fp32"),
}


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return import_checkpoint(tiny_model, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def calibration() -> Text:
    words = "def read(path):\n    with open(path) as file:\n        return file.read()\n"
    return Text(name="calibration", documents=tuple(f"# file {n}\n{words}" * 4 for n in range(12)))


def apply_step(step, checkpoint: Checkpoint, calibration: Text, directory: Path) -> Checkpoint:
    directory.mkdir()
    spec = step.apply(checkpoint, directory, compression_context(checkpoint, calibration))
    return Checkpoint.seal(directory, format="checkpoint-1", spec=spec, made_by={})


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
class TestEveryStep:
    def test_output_loads_and_computes(self, step, checkpoint, calibration, tmp_path):
        after = apply_step(step, checkpoint, calibration, tmp_path / "out")
        network = modeling.load(after)
        logits = network(torch.tensor([[1, 2, 3]])).logits
        assert logits.shape == (1, 3, checkpoint.spec.vocabulary_size)
        assert torch.isfinite(logits).all()

    def test_recorded_sizes_match_the_weights(self, step, checkpoint, calibration, tmp_path):
        after = apply_step(step, checkpoint, calibration, tmp_path / "out")
        network = modeling.load(after)
        weights = [p.numel() for name, p in network.named_parameters() if not name.endswith(".bias")]
        assert sum(weights) == after.spec.parameters

    def test_plan_predicts_the_parameter_count(self, step, checkpoint, calibration, tmp_path):
        after = apply_step(step, checkpoint, calibration, tmp_path / "out")
        assert step.plan(checkpoint.spec).parameters == after.spec.parameters

    def test_equal_inputs_give_equal_digests(self, step, checkpoint, calibration, tmp_path):
        first = apply_step(step, checkpoint, calibration, tmp_path / "first")
        second = apply_step(step, checkpoint, calibration, tmp_path / "second")
        assert first.digest == second.digest

    def test_input_checkpoint_is_unchanged(self, step, checkpoint, calibration, tmp_path):
        apply_step(step, checkpoint, calibration, tmp_path / "out")
        checkpoint.verify()

    def test_tokenizer_is_copied(self, step, checkpoint, calibration, tmp_path):
        after = apply_step(step, checkpoint, calibration, tmp_path / "out")
        assert (after.directory / "tokenizer.json").read_bytes() == (
            checkpoint.directory / "tokenizer.json"
        ).read_bytes()

    def test_config_round_trip_gives_equal_step(self, step, checkpoint, calibration, tmp_path):
        assert instantiate(json.loads(json.dumps(to_config(step)))) == step


FLOAT_STEPS = {
    name: step
    for name, step in STEPS.items()
    if not (isinstance(step, (Quantize, MixedPrecision, KvCache, Int8)) or name == "lora unmerged")
}


@pytest.mark.parametrize("step", [*FLOAT_STEPS.values(), STEPS["int4"]], ids=[*FLOAT_STEPS, "int4"])
def test_quantized_weights_may_not_be_changed(step, checkpoint):
    quantized = STEPS["int8"].plan(checkpoint.spec)
    with pytest.raises(ConfigError, match="cannot follow quantize"):
        step.plan(quantized)


@pytest.mark.parametrize("name", [name for name in STEPS if not name.startswith(("kv_cache", "lora unmerged"))])
def test_weights_under_an_adapter_may_not_be_changed(name, checkpoint):
    adapted_spec = STEPS["lora unmerged"].plan(checkpoint.spec)
    with pytest.raises(ConfigError, match="cannot follow lora with merge=false"):
        STEPS[name].plan(adapted_spec)


def plan_error(step, spec) -> str:
    """Return the error message of the step's plan for `spec`, or "" if it accepts `spec`."""
    try:
        step.plan(spec)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_sparse_model_stays_sparse_or_is_rejected(step, checkpoint, calibration, tmp_path):
    sparse = apply_step(STEPS["sparsify"], checkpoint, calibration, tmp_path / "sparse")
    if message := plan_error(step, sparse.spec):
        assert "cannot follow sparsify" in message
        return
    after = apply_step(step, sparse, calibration, tmp_path / "after")
    assert after.spec.sparsity == "2:4"
    for layer in modeling.layers(modeling.load(after)):
        for module in (m for m in layer.modules() if isinstance(m, torch.nn.Linear)):
            assert (module.weight.reshape(-1, 4) == 0).sum(dim=1).min() >= 2
