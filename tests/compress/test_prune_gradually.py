"""Test gradual pruning: its rounds, its quality limit and its held-out text."""

import json
import math
from dataclasses import replace

import pytest
import torch
from support import specs
from support.stages import compression_context

from edgeopt.checkpoints import modeling
from edgeopt.checkpoints.importing import import_checkpoint
from edgeopt.compress.losses import perplexity
from edgeopt.compress.pruning.prune_depth import PruneDepth
from edgeopt.compress.pruning.prune_gradually import HELD_OUT_INTERVAL, PruneGradually
from edgeopt.compress.pruning.prune_heads import PruneHeads
from edgeopt.compress.pruning.prune_width import PruneWidth
from edgeopt.compress.quantization.quantize import Quantize
from edgeopt.compress.recovery.distill import Distill
from edgeopt.compress.recovery.lora import Lora
from edgeopt.core.artifact import Checkpoint
from edgeopt.core.corpus import Text
from edgeopt.datasets.bundled import BundledText
from edgeopt.errors import ConfigError, StepError
from edgeopt.models.reference import ReferenceModel


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Checkpoint:
    return import_checkpoint(ReferenceModel().locate(), tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def calibration() -> Text:
    return BundledText(split="calibration").load()


def prune_half(**values) -> PruneGradually:
    """Return a step that removes half of the width in two rounds with minimal training."""
    prune = PruneWidth(ratio=0.5, distribution="uniform", windows=2, window_tokens=64)
    retrain = Distill(tokens=64, batch_tokens=64, window_tokens=64, learning_rate=1e-6)
    return PruneGradually(**{"prune": prune, "retrain": retrain, "round_ratio": 0.25, **values})


def report(directory) -> list[dict]:
    return json.loads((directory / "artifacts" / "prune_gradually.json").read_text())


def test_result_is_last_round_within_limit(reference, calibration, tmp_path):
    spec = prune_half(max_perplexity_ratio=1.4).apply(reference, tmp_path, compression_context(reference, calibration))
    assert {layer.intermediate_size for layer in spec.layers} == {576}
    assert [entry["kept"] for entry in report(tmp_path)] == [True, False]
    accepted, rejected = (entry["perplexity_ratio"] for entry in report(tmp_path))
    assert accepted <= 1.4 < rejected
    assert Quantize().plan(spec).schemes, "a later step accepts the resulting sizes"


def test_unlimited_pruning_reaches_planned_size(reference, calibration, tmp_path):
    step = prune_half(max_perplexity_ratio=None)
    assert step.apply(reference, tmp_path, compression_context(reference, calibration)) == step.plan(reference.spec)
    assert [entry["kept"] for entry in report(tmp_path)] == [True, True]


def test_first_round_above_limit_raises_step_error(reference, calibration, tmp_path):
    with pytest.raises(
        StepError, match=r"max_perplexity_ratio: The first of 2 rounds raised perplexity to 1\.\d+ times.*limit 1\.001"
    ):
        prune_half(max_perplexity_ratio=1.001).apply(reference, tmp_path, compression_context(reference, calibration))


def test_held_out_text_does_not_affect_model(reference, calibration, tmp_path):
    """Replacing the held-out documents gives the same model."""
    replacements = [f"{number} " * 300 for number in range(len(calibration.documents))]
    changed = [
        replacements[n] if (n + 1) % HELD_OUT_INTERVAL == 0 else document
        for n, document in enumerate(calibration.documents)
    ]
    step, weights = prune_half(round_ratio=0.5, max_perplexity_ratio=None), []
    for name, text in (("first", calibration), ("second", replace(calibration, documents=tuple(changed)))):
        (tmp_path / name).mkdir()
        step.apply(reference, tmp_path / name, compression_context(reference, text))
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_single_calibration_document_is_rejected(reference, tmp_path):
    with pytest.raises(StepError, match="must have at least 2 documents"):
        prune_half().apply(reference, tmp_path, compression_context(reference))


@pytest.mark.parametrize(
    ("prune", "expected"),
    [
        (PruneWidth(ratio=0.4), [(608, 4, 4), (448, 4, 4)]),
        (PruneHeads(ratio=0.5), [(768, 3, 4), (768, 2, 4)]),
        (PruneDepth(layers=3), [(768, 4, 3), (768, 4, 2), (768, 4, 1)]),
    ],
)
def test_rounds_reach_plan_in_equal_steps(prune, expected):
    spec = specs.llama(hidden=256, intermediate=768, heads=8, kv_heads=4, head_size=32, layers=4)
    rounds = prune.plan_rounds(spec, 0.2)
    assert rounds[-1] == prune.plan(spec)
    sizes = [(r.layers[0].intermediate_size, r.layers[0].kv_heads, len(r.layers)) for r in rounds]
    assert sizes == expected


def test_perplexity_is_exponential_of_mean_loss(reference):
    network, windows = modeling.load(reference), [[5, 6, 7, 8, 9, 10], [3, 4, 5]]
    total = 0.0
    for window in windows:
        log_probabilities = network(torch.tensor([window])).logits[0].double().log_softmax(-1)
        total -= sum(float(log_probabilities[n, window[n + 1]]) for n in range(len(window) - 1))
    assert perplexity(network, windows) == pytest.approx(math.exp(total / 7), rel=1e-5)


@pytest.mark.parametrize(
    ("values", "location"),
    [
        ({"round_ratio": 1.0}, "round_ratio"),
        ({"max_perplexity_ratio": 0.9}, "max_perplexity_ratio"),
        ({"max_perplexity_ratio": math.nan}, "max_perplexity_ratio"),
        ({"prune": Quantize()}, "prune"),
        ({"retrain": PruneWidth()}, "retrain"),
    ],
)
def test_invalid_values_are_rejected(values, location):
    with pytest.raises(ConfigError) as error:
        prune_half(**values)
    assert error.value.location == location


def test_plan_errors_name_nested_field(reference):
    with pytest.raises(ConfigError, match=r"^prune\.ratio: .*must remove some but not all"):
        prune_half(prune=PruneWidth(ratio=0.02)).plan(reference.spec)
    with pytest.raises(ConfigError, match=r"^retrain\.rank: "):
        prune_half(prune=PruneWidth(ratio=0.95, multiple=8), retrain=Lora(rank=64)).plan(reference.spec)
