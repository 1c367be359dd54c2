"""Test distillation losses against their formulas, distillation, and quantization-aware training."""

from dataclasses import replace

import pytest
import torch
from support.stages import compression_context

from edgeopt.checkpoints import modeling, quantized_matrix, safetensors_io
from edgeopt.checkpoints.importing import import_checkpoint, model_sources
from edgeopt.compress.activations import calibration_windows
from edgeopt.compress.losses import next_token_loss
from edgeopt.compress.pruning.prune_gradually import PruneGradually
from edgeopt.compress.pruning.prune_width import PruneWidth
from edgeopt.compress.quantization.gptq import Gptq
from edgeopt.compress.quantization.qat import Qat, parametrize
from edgeopt.compress.quantization.quantize import Quantize
from edgeopt.compress.recovery.distill import Distill, add_hidden_state_loss, teacher_layer
from edgeopt.compress.recovery.teacher_logits import compute_teacher_logits, distillation_loss, top_k_divergence
from edgeopt.core.artifact import Checkpoint
from edgeopt.core.corpus import Text
from edgeopt.datasets.bundled import BundledText
from edgeopt.errors import ConfigError
from edgeopt.models.local import LocalFolder
from edgeopt.models.reference import ReferenceModel

TEXT = Text(name="text", documents=tuple(f"def f{n}(x):\n    return x + {n}\n" * 6 for n in range(8)))
QUICK = {"tokens": 4096, "batch_tokens": 128, "window_tokens": 32, "top_k": 300}


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory) -> Checkpoint:
    return import_checkpoint(tiny_model, tmp_path_factory.mktemp("checkpoint"))


def apply_step(step, checkpoint: Checkpoint, directory, original: Checkpoint, text: Text = TEXT) -> Checkpoint:
    directory.mkdir()
    spec = step.apply(checkpoint, directory, compression_context(original, text))
    return Checkpoint.seal(directory, format="checkpoint-1", spec=spec, made_by={})


def mean_divergence(teacher: Checkpoint, student: Checkpoint, text: Text = TEXT) -> float:
    """Return the mean KL(teacher ‖ student) in nats per token."""
    total = count = 0.0
    for window in calibration_windows(teacher, text, count=8, length=32):
        with torch.no_grad():
            p, q = (modeling.load(c)(torch.tensor([window])).logits[0].log_softmax(-1) for c in (teacher, student))
        total, count = total + float((p.exp() * (p - q)).sum()), count + len(window)
    return total / count


def test_divergence_of_all_tokens_is_kl():
    p, q = (torch.randn(5, 40, generator=torch.Generator().manual_seed(n)).log_softmax(-1) for n in (0, 1))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    torch.testing.assert_close(top_k_divergence(p, q), expected, rtol=1e-3, atol=1e-4)


def test_unlisted_tokens_count_as_one_token():
    p, q = (torch.randn(5, 40, generator=torch.Generator().manual_seed(n)).log_softmax(-1) for n in (0, 1))
    listed_tokens = p.topk(6, dim=-1).indices

    def merged(x: torch.Tensor) -> torch.Tensor:
        listed = x.gather(1, listed_tokens).exp()
        return torch.cat([listed, 1 - listed.sum(-1, keepdim=True)], dim=-1)

    expected = (merged(p) * (merged(p) / merged(q)).log()).sum(-1)
    torch.testing.assert_close(
        top_k_divergence(p.gather(1, listed_tokens), q.gather(1, listed_tokens)), expected, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_loss_matches_formula(temperature, checkpoint, tmp_path):
    student = modeling.load(
        apply_step(PruneWidth(ratio=0.5, windows=2, window_tokens=32), checkpoint, tmp_path / "student", checkpoint)
    )
    windows = [[5, 6, 7, 8, 9], [3, 4, 5]]
    teacher_logits = compute_teacher_logits(
        checkpoint, windows, top_k=300, temperature=temperature, context=compression_context(checkpoint)
    )
    kl, count = 0.0, 0
    for window in windows:
        with torch.no_grad():
            p, q = (
                (network(torch.tensor([window])).logits[0] / temperature).log_softmax(-1)
                for network in (modeling.load(checkpoint), student)
            )
        kl, count = kl + float((p.exp() * (p - q)).sum()), count + len(window)
    text_loss = float(next_token_loss(windows)(student, [0, 1]))
    expected = 0.75 * temperature**2 * kl / count + 0.25 * text_loss
    loss = distillation_loss(windows, teacher_logits, temperature=temperature, truth_weight=0.25)
    assert float(loss(student, [0, 1])) == pytest.approx(expected, rel=1e-2)


def test_hidden_state_loss_is_zero_for_teacher(checkpoint):
    network, windows = modeling.load(checkpoint), [[5, 6, 7, 8], [9, 9]]
    loss = add_hidden_state_loss(lambda *_: torch.tensor(0.5), modeling.load(checkpoint), windows, 3.0)
    assert float(loss(network, [0, 1])) == pytest.approx(0.5)
    modeling.layers(network)[0].mlp.down_proj.weight.data += 0.1
    assert float(loss(network, [0, 1])) > 0.5


def test_teacher_layers_are_mapped_evenly():
    assert [teacher_layer(n, 2, 4) for n in range(2)] == [1, 3]
    assert [teacher_layer(n, 4, 4) for n in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("values", [{}, {"hidden_weight": 1.0}, {"temperature": 2.0}], ids=str)
def test_distillation_reduces_divergence_from_teacher(values, checkpoint, tmp_path):
    pruned = apply_step(PruneWidth(ratio=0.5, windows=2, window_tokens=32), checkpoint, tmp_path / "pruned", checkpoint)
    step = Distill(**QUICK, learning_rate=3e-4, truth_weight=0.0, **values)
    distilled = apply_step(step, pruned, tmp_path / "distilled", checkpoint)
    assert mean_divergence(checkpoint, distilled) < 0.5 * mean_divergence(checkpoint, pruned)


def test_teacher_can_be_another_model(checkpoint, tiny_model, tmp_path):
    step = Distill(**{**QUICK, "tokens": 128}, teacher=LocalFolder(path=str(tiny_model)))
    apply_step(step, checkpoint, tmp_path / "out", checkpoint)


def test_model_sources_include_teacher(tiny_model):
    teacher = LocalFolder(path=str(tiny_model))
    assert model_sources(Distill(teacher=teacher)) == [teacher]
    assert model_sources(Distill()) == []
    assert model_sources(PruneGradually(retrain=Distill(teacher=teacher))) == [teacher]


def test_teacher_with_other_vocabulary_is_rejected(checkpoint, tiny_model, tmp_path):
    student = replace(checkpoint, spec=replace(checkpoint.spec, vocabulary_size=999))
    with pytest.raises(ConfigError, match=r"vocabulary size of the model .999 tokens., got 300 tokens"):
        Distill(teacher=LocalFolder(path=str(tiny_model)))._load_teacher(student, compression_context(checkpoint))


class TestQuantizationAwareTraining:
    """Use the bundled model and texts, because quantization hardly affects the quality of a random model."""

    CALIBRATION = BundledText(split="calibration").load()

    @pytest.fixture(scope="class")
    def checkpoint(self, tmp_path_factory) -> Checkpoint:
        return import_checkpoint(ReferenceModel().locate(), tmp_path_factory.mktemp("reference"))

    @pytest.fixture(scope="class")
    def rounded(self, checkpoint, tmp_path_factory) -> Checkpoint:
        step = Quantize(weights="int2", block_size=32, rounding=Gptq(), windows=8)
        return apply_step(step, checkpoint, tmp_path_factory.mktemp("qat") / "int2", checkpoint, self.CALIBRATION)

    @pytest.fixture(scope="class")
    def trained(self, rounded, checkpoint, tmp_path_factory) -> Checkpoint:
        step = Qat(tokens=16_384, batch_tokens=1024, window_tokens=128, learning_rate=0.005)
        return apply_step(step, rounded, tmp_path_factory.mktemp("qat") / "qat", checkpoint, self.CALIBRATION)

    def test_qat_reduces_divergence_on_validation_text(self, checkpoint, rounded, trained):
        validation = BundledText(split="validation").load()
        assert mean_divergence(checkpoint, trained, validation) < 0.9 * mean_divergence(checkpoint, rounded, validation)

    def test_qat_changes_only_layer_codes_and_scales(self, rounded, trained):
        before, after = (safetensors_io.read_folder(c.directory) for c in (rounded, trained))
        assert before.keys() == after.keys()
        changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
        assert changed == {"codes", "scales"}
        assert torch.equal(before["model.embed_tokens.codes"], after["model.embed_tokens.codes"])

    def test_stored_weights_equal_trained_weights(self, rounded, checkpoint):
        network = modeling.load(rounded)
        matrices = quantized_matrix.quantized_matrices(safetensors_io.read_folder(rounded.directory))
        name = "model.layers.0.mlp.down_proj"
        parametrization = parametrize(network, modeling.load(checkpoint), matrices, rounded.spec)[name]
        assert torch.equal(parametrization.to_matrix().codes, matrices[name].codes), (
            "training starts from the stored codes"
        )
        with torch.no_grad():
            parametrization.codes += torch.randn(parametrization.codes.shape) * 0.7
            parametrization.scale_change += torch.randn(parametrization.scale_change.shape)
        assert torch.equal(network.get_submodule(name).weight, parametrization.to_matrix().weight)

    def test_float_model_is_rejected(self, checkpoint):
        with pytest.raises(ConfigError, match="no layer is quantized") as error:
            Qat().plan(checkpoint.spec)
        assert error.value.location == "order"


@pytest.mark.parametrize(
    ("values", "location"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"truth_weight": 1.5}, "truth_weight"),
        ({"hidden_weight": -1.0}, "hidden_weight"),
        ({"top_k": 0}, "top_k"),
    ],
)
def test_invalid_values_are_rejected(values, location):
    with pytest.raises(ConfigError) as error:
        Distill(**values)
    assert error.value.location == location
