"""Gradual pruning stops where quality ends, judged by text that it never learnt from."""

import json
import math
from dataclasses import replace

import pytest
import torch
from support import specs
from support.workshops import workshop

from edgeopt.checkpoints import modeling
from edgeopt.checkpoints.importing import import_checkpoint
from edgeopt.compress.losses import perplexity
from edgeopt.compress.pruning.prune_depth import PruneDepth
from edgeopt.compress.pruning.prune_gradually import JUDGING, PruneGradually
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


def halving(**values) -> PruneGradually:
    """Half the width in two rounds, and hardly any training between."""
    prune = PruneWidth(ratio=0.5, distribution="uniform", windows=2, window_tokens=64)
    retrain = Distill(tokens=64, batch_tokens=64, window_tokens=64, learning_rate=1e-6)
    return PruneGradually(**{"prune": prune, "retrain": retrain, "round_ratio": 0.25, **values})


def report(directory) -> list[dict]:
    return json.loads((directory / "artifacts" / "prune_gradually.json").read_text())


def test_it_stops_with_the_last_model_within_the_limit(reference, calibration, tmp_path):
    spec = halving(max_perplexity_ratio=1.4).apply(reference, tmp_path, workshop(reference, calibration))
    assert {layer.intermediate_size for layer in spec.layers} == {576}
    assert [entry["kept"] for entry in report(tmp_path)] == [True, False]
    kept, refused = (entry["perplexity_ratio"] for entry in report(tmp_path))
    assert kept <= 1.4 < refused
    assert Quantize().plan(spec).schemes, "a later step takes the model as it became"


def test_without_a_limit_it_reaches_the_plan(reference, calibration, tmp_path):
    step = halving(max_perplexity_ratio=None)
    assert step.apply(reference, tmp_path, workshop(reference, calibration)) == step.plan(reference.spec)
    assert [entry["kept"] for entry in report(tmp_path)] == [True, True]


def test_a_first_round_beyond_the_limit_is_a_failure_with_its_figure(reference, calibration, tmp_path):
    with pytest.raises(
        StepError, match=r"max_perplexity_ratio: the first round of 2 leaves 1\.\d+ times.*above 1\.001"
    ):
        halving(max_perplexity_ratio=1.001).apply(reference, tmp_path, workshop(reference, calibration))


def test_text_that_judges_is_not_learnt_from(reference, calibration, tmp_path):
    """Other documents in the judges' places give the same model."""
    strange = [f"{number} " * 300 for number in range(len(calibration.documents))]
    mixed = [strange[n] if (n + 1) % JUDGING == 0 else document for n, document in enumerate(calibration.documents)]
    once, made = halving(round_ratio=0.5, max_perplexity_ratio=None), []
    for name, text in (("first", calibration), ("second", replace(calibration, documents=tuple(mixed)))):
        (tmp_path / name).mkdir()
        once.apply(reference, tmp_path / name, workshop(reference, text))
        made.append((tmp_path / name / "model.safetensors").read_bytes())
    assert made[0] == made[1]


def test_one_document_cannot_both_teach_and_judge(reference, tmp_path):
    with pytest.raises(StepError, match="several documents"):
        halving().apply(reference, tmp_path, workshop(reference))


@pytest.mark.parametrize(
    ("prune", "expected"),
    [
        (PruneWidth(ratio=0.4), [(608, 4, 4), (448, 4, 4)]),
        (PruneHeads(ratio=0.5), [(768, 3, 4), (768, 2, 4)]),
        (PruneDepth(layers=3), [(768, 4, 3), (768, 4, 2), (768, 4, 1)]),
    ],
)
def test_rounds_lead_to_the_plan_by_nearly_equal_steps(prune, expected):
    spec = specs.llama(hidden=256, intermediate=768, heads=8, kv_heads=4, head_size=32, layers=4)
    rounds = prune.rounds(spec, 0.2)
    assert rounds[-1] == prune.plan(spec)
    sizes = [(r.layers[0].intermediate_size, r.layers[0].kv_heads, len(r.layers)) for r in rounds]
    assert sizes == expected


def test_perplexity_is_the_exponential_of_the_mean_loss_of_a_token(reference):
    network, windows = modeling.load(reference), [[5, 6, 7, 8, 9, 10], [3, 4, 5]]
    total = 0.0
    for window in windows:
        chances = network(torch.tensor([window])).logits[0].double().log_softmax(-1)
        total -= sum(float(chances[n, window[n + 1]]) for n in range(len(window) - 1))
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
def test_values_outside_their_range_are_refused(values, location):
    with pytest.raises(ConfigError) as caught:
        halving(**values)
    assert caught.value.location == location


def test_what_does_not_fit_the_sizes_is_told_by_its_place(reference):
    with pytest.raises(ConfigError, match=r"^prune\.ratio: .*leaves"):
        halving(prune=PruneWidth(ratio=0.02)).plan(reference.spec)
    with pytest.raises(ConfigError, match=r"^retrain\.rank: "):
        halving(prune=PruneWidth(ratio=0.95, multiple=8), retrain=Lora(rank=64)).plan(reference.spec)
