"""Learning from a teacher: the losses by their formulas, and that a student comes nearer to its teacher."""

from dataclasses import replace

import pytest
import torch
from support.workshops import workshop

from edgeopt.checkpoints import modeling, quantized_matrix, safetensors_io
from edgeopt.checkpoints.importing import import_checkpoint, sources
from edgeopt.compress.activations import calibration_windows
from edgeopt.compress.losses import next_token_loss
from edgeopt.compress.pruning.prune_gradually import PruneGradually
from edgeopt.compress.pruning.prune_width import PruneWidth
from edgeopt.compress.quantization.gptq import Gptq
from edgeopt.compress.quantization.qat import Qat
from edgeopt.compress.quantization.quantize import Quantize
from edgeopt.compress.recovery.distill import Distill, mapped, with_hidden_states
from edgeopt.compress.recovery.teacher_logits import distillation_loss, divergence, lessons
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


def applied(step, checkpoint: Checkpoint, directory, original: Checkpoint, text: Text = TEXT) -> Checkpoint:
    directory.mkdir()
    spec = step.apply(checkpoint, directory, workshop(original, text))
    return Checkpoint.seal(directory, format="checkpoint-1", spec=spec, made_by={})


def distance(teacher: Checkpoint, student: Checkpoint, text: Text = TEXT) -> float:
    """Mean KL(teacher ‖ student) in nats a token."""
    total = count = 0.0
    for window in calibration_windows(teacher, text, count=8, length=32):
        with torch.no_grad():
            p, q = (modeling.load(c)(torch.tensor([window])).logits[0].log_softmax(-1) for c in (teacher, student))
        total, count = total + float((p.exp() * (p - q)).sum()), count + len(window)
    return total / count


def test_with_every_token_listed_the_divergence_is_that_of_kullback_and_leibler():
    p, q = (torch.randn(5, 40, generator=torch.Generator().manual_seed(n)).log_softmax(-1) for n in (0, 1))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    torch.testing.assert_close(divergence(p, q), expected, rtol=1e-3, atol=1e-4)


def test_tokens_that_are_not_listed_count_as_one():
    p, q = (torch.randn(5, 40, generator=torch.Generator().manual_seed(n)).log_softmax(-1) for n in (0, 1))
    best = p.topk(6, dim=-1).indices

    def lumped(x: torch.Tensor) -> torch.Tensor:
        listed = x.gather(1, best).exp()
        return torch.cat([listed, 1 - listed.sum(-1, keepdim=True)], dim=-1)

    expected = (lumped(p) * (lumped(p) / lumped(q)).log()).sum(-1)
    torch.testing.assert_close(divergence(p.gather(1, best), q.gather(1, best)), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_is_the_formula_of_hinton_and_others(temperature, checkpoint, tmp_path):
    student = modeling.load(
        applied(PruneWidth(ratio=0.5, windows=2, window_tokens=32), checkpoint, tmp_path / "s", checkpoint)
    )
    windows = [[5, 6, 7, 8, 9], [3, 4, 5]]
    taught = lessons(checkpoint, windows, top_k=300, temperature=temperature, context=workshop(checkpoint))
    kl, count = 0.0, 0
    for window in windows:
        with torch.no_grad():
            p, q = (
                (n(torch.tensor([window])).logits[0] / temperature).log_softmax(-1)
                for n in (modeling.load(checkpoint), student)
            )
        kl, count = kl + float((p.exp() * (p - q)).sum()), count + len(window)
    own = float(next_token_loss(windows)(student, [0, 1]))
    expected = 0.75 * temperature**2 * kl / count + 0.25 * own
    loss = distillation_loss(windows, taught, temperature=temperature, truth_weight=0.25)
    assert float(loss(student, [0, 1])) == pytest.approx(expected, rel=1e-2)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_hidden_states(checkpoint):
    network, windows = modeling.load(checkpoint), [[5, 6, 7, 8], [9, 9]]
    loss = with_hidden_states(lambda *_: torch.tensor(0.5), modeling.load(checkpoint), windows, 3.0)
    assert float(loss(network, [0, 1])) == pytest.approx(0.5)
    modeling.layers(network)[0].mlp.down_proj.weight.data += 0.1
    assert float(loss(network, [0, 1])) > 0.5


def test_layers_are_mapped_evenly_and_the_last_to_the_last():
    assert [mapped(n, 2, 4) for n in range(2)] == [1, 3]
    assert [mapped(n, 4, 4) for n in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("values", [{}, {"hidden_weight": 1.0}, {"temperature": 2.0}], ids=str)
def test_a_student_comes_nearer_to_its_teacher(values, checkpoint, tmp_path):
    cut = applied(PruneWidth(ratio=0.5, windows=2, window_tokens=32), checkpoint, tmp_path / "cut", checkpoint)
    step = Distill(**QUICK, learning_rate=3e-4, truth_weight=0.0, **values)
    taught = applied(step, cut, tmp_path / "taught", checkpoint)
    assert distance(checkpoint, taught) < 0.5 * distance(checkpoint, cut)


def test_another_model_may_teach(checkpoint, tiny_model, tmp_path):
    step = Distill(**{**QUICK, "tokens": 128}, teacher=LocalFolder(path=str(tiny_model)))
    applied(step, checkpoint, tmp_path / "out", checkpoint)


def test_a_teacher_is_a_model_that_the_step_reads_beside_its_input(tiny_model):
    teacher = LocalFolder(path=str(tiny_model))
    assert sources(Distill(teacher=teacher)) == [teacher]
    assert sources(Distill()) == []
    assert sources(PruneGradually(retrain=Distill(teacher=teacher))) == [teacher]


def test_a_teacher_of_another_vocabulary_is_refused(checkpoint, tiny_model, tmp_path):
    other = replace(checkpoint, spec=replace(checkpoint.spec, vocabulary_size=999))
    with pytest.raises(ConfigError, match="knows 300 tokens and the model 999"):
        Distill(teacher=LocalFolder(path=str(tiny_model)))._teacher(other, workshop(checkpoint))


class TestQuantizationAwareTraining:
    """On the bundled model and its texts: in a random model nothing hangs on the codes."""

    CALIBRATION = BundledText(split="calibration").load()

    @pytest.fixture(scope="class")
    def checkpoint(self, tmp_path_factory) -> Checkpoint:
        return import_checkpoint(ReferenceModel().locate(), tmp_path_factory.mktemp("reference"))

    @pytest.fixture(scope="class")
    def rounded(self, checkpoint, tmp_path_factory) -> Checkpoint:
        step = Quantize(weights="int2", block_size=32, rounding=Gptq(), windows=8)
        return applied(step, checkpoint, tmp_path_factory.mktemp("qat") / "int2", checkpoint, self.CALIBRATION)

    @pytest.fixture(scope="class")
    def trained(self, rounded, checkpoint, tmp_path_factory) -> Checkpoint:
        step = Qat(tokens=16_384, batch_tokens=1024, window_tokens=128, learning_rate=0.005)
        return applied(step, rounded, tmp_path_factory.mktemp("qat") / "qat", checkpoint, self.CALIBRATION)

    def test_the_rounded_model_comes_nearer_to_the_original_on_other_text(self, checkpoint, rounded, trained):
        validation = BundledText(split="validation").load()
        assert distance(checkpoint, trained, validation) < 0.9 * distance(checkpoint, rounded, validation)

    def test_only_codes_and_scales_of_layers_have_moved(self, rounded, trained):
        before, after = (safetensors_io.read_folder(c.directory) for c in (rounded, trained))
        assert before.keys() == after.keys()
        moved = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
        assert moved == {"codes", "scales"}
        assert torch.equal(before["model.embed_tokens.codes"], after["model.embed_tokens.codes"])

    def test_what_was_trained_is_bit_for_bit_what_is_stored(self, rounded, checkpoint):
        from edgeopt.compress.quantization.qat import parametrize

        network = modeling.load(rounded)
        matrices = quantized_matrix.rounded(safetensors_io.read_folder(rounded.directory))
        name = "model.layers.0.mlp.down_proj"
        form = parametrize(network, modeling.load(checkpoint), matrices, rounded.spec)[name]
        assert torch.equal(form.rounded().codes, matrices[name].codes), "training begins at the codes that it is given"
        with torch.no_grad():
            form.codes += torch.randn(form.codes.shape) * 0.7
            form.change += torch.randn(form.change.shape)
        assert torch.equal(network.get_submodule(name).weight, form.rounded().weight)

    def test_a_model_in_float_is_refused(self, checkpoint):
        with pytest.raises(ConfigError, match="none are") as caught:
            Qat().plan(checkpoint.spec)
        assert caught.value.location == "order"


@pytest.mark.parametrize(
    ("values", "location"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"truth_weight": 1.5}, "truth_weight"),
        ({"hidden_weight": -1.0}, "hidden_weight"),
        ({"top_k": 0}, "top_k"),
    ],
)
def test_values_outside_their_range_are_refused(values, location):
    with pytest.raises(ConfigError) as caught:
        Distill(**values)
    assert caught.value.location == location
