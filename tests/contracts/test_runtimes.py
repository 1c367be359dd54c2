"""Contract suite of `Runtime`: engines that a runtime builds and opens."""

from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from support import adapter_checkpoints
from support.stages import apply_step, build_engine, predict_metric

from edgeopt.checkpoints import modeling
from edgeopt.checkpoints.importing import import_checkpoint
from edgeopt.compress.quantization.int8 import Int8
from edgeopt.compress.quantization.kv_cache import KvCache
from edgeopt.compress.quantization.llama_quantize import LlamaQuantize
from edgeopt.compress.quantization.quantize import Quantize
from edgeopt.core.artifact import Checkpoint, Engine
from edgeopt.core.library_versions import distribution
from edgeopt.errors import BuildError, ConfigError
from edgeopt.measure.stats.divergence import relative_error
from edgeopt.runtimes.genai.runtime import Genai
from edgeopt.runtimes.llamacpp.runtime import LlamaCpp
from edgeopt.runtimes.onnx.runtime import PortableOnnx
from edgeopt.runtimes.tensorrt.runtime import TensorRt
from edgeopt.runtimes.torch_eager import Torch

RUNTIMES = {"genai": Genai(), "onnx": PortableOnnx(), "torch": Torch()}
if find_spec("llama_cpp"):
    RUNTIMES["llamacpp"] = LlamaCpp()
PROMPT = [1, 17, 42, 99, 7]


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return import_checkpoint(tiny_model, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def logits(checkpoint) -> np.ndarray:
    import torch

    return modeling.load(checkpoint)(torch.tensor([PROMPT])).logits[0].numpy()


@pytest.fixture(scope="module", params=RUNTIMES.values(), ids=RUNTIMES.keys())
def runtime(request):
    return request.param


@pytest.fixture(scope="module")
def engine(runtime, checkpoint, tmp_path_factory) -> Engine:
    return build_engine(runtime, checkpoint, tmp_path_factory.mktemp("engines") / "engine")


@pytest.fixture(scope="module")
def session(runtime, engine):
    opened = runtime.open(engine, threads=1)
    yield opened
    opened.close()
    opened.close()


class TestEveryRuntime:
    def test_logits_match_checkpoint(self, session, logits):
        engine_logits = session.logits(PROMPT)
        assert engine_logits.dtype == np.float32
        assert np.abs(engine_logits - logits).max() < 1e-3 * np.abs(logits).max()

    def test_layers_of_different_widths_match_torch(self, runtime, checkpoint, tmp_path):
        import torch

        network = modeling.load(checkpoint)
        modeling.keep_channels(modeling.layers(network)[1].mlp, torch.arange(64))
        (tmp_path / "pruned").mkdir()
        spec = modeling.spec_of(network, checkpoint.spec)
        modeling.save(network, tmp_path / "pruned", checkpoint, spec)
        pruned = Checkpoint.seal(tmp_path / "pruned", format="checkpoint-1", spec=spec, made_by={})
        opened = runtime.open(build_engine(runtime, pruned, tmp_path / "engine"), threads=1)
        expected = network(torch.tensor([PROMPT])).logits[0].numpy()
        engine_logits = opened.logits(PROMPT)
        opened.close()
        assert np.abs(engine_logits - expected).max() < 1e-3 * np.abs(expected).max()

    def test_greedy_decoding_follows_logits(self, session):
        tokens = list(PROMPT)
        for token in session.generate(PROMPT, 6, stop_at_end=False):
            scores = session.logits(tokens)[-1]
            assert scores[token] >= np.sort(scores)[-2]  # the end token is excluded and may rank first
            tokens.append(token)
        assert len(tokens) == len(PROMPT) + 6

    def test_generation_is_repeatable(self, session):
        first, second = (list(session.generate(PROMPT, 8, stop_at_end=False)) for _ in range(2))
        assert first == second

    @pytest.mark.parametrize("tokens", [1, 3, 64])
    def test_chunked_prefill_gives_same_logits(self, runtime, engine, logits, tokens):
        chunked = replace(runtime, prompt_tokens=tokens) if hasattr(runtime, "prompt_tokens") else runtime
        opened = chunked.open(engine, threads=1)
        assert relative_error(logits, opened.logits(PROMPT)) < 1e-3
        opened.close()

    def test_end_token_is_not_yielded(self, session, checkpoint):
        assert 0 not in list(session.generate(PROMPT, 64))

    def test_build_has_no_slow_path(self, runtime, engine):
        assert runtime.lint(engine) == []

    def test_build_is_deterministic(self, runtime, engine, checkpoint, tmp_path):
        assert build_engine(runtime, checkpoint, tmp_path / "again").digest == engine.digest

    def test_predicted_size_matches_engine(self, runtime, engine):
        sizes = predict_metric(runtime, engine)
        assert bool(sizes) != isinstance(runtime, Torch), "the reference runtime predicts no size"
        for size in sizes:
            assert size.low < engine.size_bytes / 2**20 < size.high
            assert size.value == pytest.approx(engine.size_bytes / 2**20, rel=0.05)

    def test_libraries_belong_to_installed_distributions(self, runtime):
        assert all(metadata.version(distribution(module)) for module in runtime.LIBRARIES)

    def test_engine_of_another_format_is_rejected(self, runtime, engine):
        with pytest.raises(BuildError, match=r"must have the format .*, got other-1"):
            runtime.open(replace(engine, format="other-1"), threads=1)


@pytest.fixture(scope="module")
def two_adapters(checkpoint, tmp_path_factory) -> Checkpoint:
    """Return the model with adapters of rank 8 on all projections and of rank 3 on some of them."""
    folder = tmp_path_factory.mktemp("adapters")
    one = adapter_checkpoints.add_adapter(checkpoint, folder / "one", "r8")
    return adapter_checkpoints.add_adapter(one, folder / "two", "r3", targets=("q_proj", "v_proj", "up_proj"))


@pytest.fixture(scope="module")
def adapter_session(runtime, two_adapters, tmp_path_factory):
    opened = runtime.open(
        build_engine(runtime, two_adapters, tmp_path_factory.mktemp("engines") / "adapters"), threads=1
    )
    yield opened
    opened.close()


class TestEveryRuntimeWithAdapters:
    def test_active_adapter_equals_merged_adapter(self, runtime, adapter_session, two_adapters, session, tmp_path):
        base = session.logits(PROMPT)
        for name in ("r8", "r3"):
            merged = adapter_checkpoints.merge_adapter(two_adapters, tmp_path / name, name)
            expected = runtime.open(build_engine(runtime, merged, tmp_path / f"{name}-engine"), threads=1).logits(
                PROMPT
            )
            assert relative_error(expected, base) > 0.1
            assert relative_error(expected, adapter_session.logits(PROMPT, adapter=name)) < 1e-3

    def test_no_adapter_computes_base(self, adapter_session, session):
        assert relative_error(session.logits(PROMPT), adapter_session.logits(PROMPT)) < 1e-6

    def test_requests_select_adapters_in_any_order(self, adapter_session):
        order = ("r8", None, "r3", "r8", None, "r3")
        logits = [adapter_session.logits(PROMPT, adapter=name) for name in order]
        tokens = [list(adapter_session.generate(PROMPT, 6, stop_at_end=False, adapter=name)) for name in order]
        for first, second in ((0, 3), (1, 4), (2, 5)):
            np.testing.assert_array_equal(logits[first], logits[second])
            assert tokens[first] == tokens[second]
        assert len(set(map(tuple, tokens))) == 3

    def test_generation_uses_active_adapter(self, adapter_session):
        (token,) = adapter_session.generate(PROMPT, 1, stop_at_end=False, adapter="r8")
        scores = adapter_session.logits(PROMPT, adapter="r8")[-1]
        assert scores[token] >= np.sort(scores)[-2]

    def test_unknown_adapter_error_lists_known_ones(self, adapter_session, session):
        with pytest.raises(ConfigError, match=r"the adapter must be one of r8, r3; got 'r9'"):
            adapter_session.logits(PROMPT, adapter="r9")
        with pytest.raises(ConfigError, match="built without adapters"):
            list(session.generate(PROMPT, 1, adapter="r8"))

    def test_build_is_deterministic(self, runtime, two_adapters, tmp_path):
        first, second = (build_engine(runtime, two_adapters, tmp_path / name) for name in ("first", "second"))
        assert first.digest == second.digest


def quantized(checkpoint: Checkpoint, directory: Path, **values) -> Checkpoint:
    return apply_step(Quantize(**values), checkpoint, directory)


@pytest.mark.parametrize(
    "values",
    [
        {"weights": "int8", "lm_head": "int8", "embedding": "int8"},
        {"weights": "int8", "lm_head": "int8", "embedding": "float", "symmetric": True},
        {"weights": "int4", "lm_head": "int8", "embedding": "int8"},
        {"weights": "int4", "lm_head": "int4", "embedding": "int4", "block_size": 16},
        {"weights": "int4", "lm_head": "float", "embedding": "float", "symmetric": True},
        {"weights": "int4", "lm_head": "int8", "embedding": "int8", "block_size": 64},
        {"weights": "int2", "lm_head": "int8", "embedding": "int8", "block_size": 32},
        {"weights": "int4", "lm_head": "int8", "embedding": "int4"},
        {"weights": "int4", "bias_correction": True, "windows": 2, "window_tokens": 32},
        {"weights": "int8", "lm_head": "float", "embedding": "int8"},
        {"weights": "fp16"},
    ],
    ids=lambda v: "-".join(map(str, v.values())),
)
def test_quantized_engine_matches_its_checkpoint(values, checkpoint, tmp_path):
    import torch

    full = build_engine(Genai(), checkpoint, tmp_path / "full")
    source = quantized(checkpoint, tmp_path / "source", **values)
    Genai().check(source.spec)
    exact, fast = (build_engine(Genai(accuracy_level=level), source, tmp_path / f"engine{level}") for level in (1, 4))
    expected = modeling.load(source)(torch.tensor([PROMPT])).logits[0].numpy()
    assert relative_error(expected, Genai().open(exact, threads=1).logits(PROMPT)) < 1e-3
    assert relative_error(expected, Genai().open(fast, threads=1).logits(PROMPT)) < 0.05
    assert Genai().lint(fast) == []
    assert fast.size_bytes < full.size_bytes


@pytest.mark.parametrize(
    "step",
    [
        Quantize(weights="fp32"),
        Quantize(weights="fp16"),
        Quantize(weights="int4", symmetric=True),
        Quantize(weights="int4", embedding="int4", bias_correction=True, windows=2, window_tokens=32),
        Int8(ranges="min_max", windows=2, window_tokens=32),
        Int8(),
        KvCache(windows=2, window_tokens=32),
    ],
    ids=["fp32", "fp16", "int4", "int4 with biases", "int8 inputs, static", "int8 inputs, dynamic", "8-bit cache"],
)
def test_genai_predicts_engine_size(step, checkpoint, tmp_path):
    engine = build_engine(Genai(), apply_step(step, checkpoint, tmp_path / "source"), tmp_path / "engine")
    (size,) = predict_metric(Genai(), engine)
    assert size.low < engine.size_bytes / 2**20 < size.high
    assert size.value == pytest.approx(engine.size_bytes / 2**20, rel=0.01)


def test_every_projection_has_configured_bits(checkpoint, tmp_path):
    import onnx

    source = quantized(checkpoint, tmp_path / "source", weights="int8", lm_head="int4", embedding="int4")
    engine = build_engine(Genai(), source, tmp_path / "engine")
    nodes = onnx.load(engine.directory / "model.onnx", load_external_data=False).graph.node
    bits = {n.name: next(a.i for a in n.attribute if a.name == "bits") for n in nodes if n.op_type == "MatMulNBits"}
    assert {b for name, b in bits.items() if "lm_head" not in name} == {8}
    assert {b for name, b in bits.items() if "lm_head" in name} == {4}


class TestGenaiChecksBeforeBuilding:
    def test_unsupported_head_size_is_rejected(self, checkpoint):
        with pytest.raises(ConfigError, match="multiple of 16"):
            Genai().check(replace(checkpoint.spec, head_size=8))

    def test_unsupported_architecture_is_rejected(self, checkpoint):
        with pytest.raises(ConfigError, match="does not support GPT2LMHeadModel"):
            Genai().check(replace(checkpoint.spec, architecture="GPT2LMHeadModel"))

    def test_varying_key_value_heads_are_rejected(self, checkpoint):
        first, *rest = checkpoint.spec.layers
        with pytest.raises(ConfigError, match="one key-value cache shape"):
            Genai().check(checkpoint.spec.with_layers((replace(first, kv_heads=1, heads=2), *rest)))

    def test_unknown_accuracy_level_is_rejected(self):
        with pytest.raises(ConfigError, match="`accuracy_level` must be 1 or 4"):
            Genai(accuracy_level=3)


@pytest.mark.parametrize(
    "runtime", [Genai(), PortableOnnx(), TensorRt(), Torch()], ids=lambda runtime: type(runtime).__name__
)
def test_llamacpp_types_are_rejected_by_other_runtimes(runtime, checkpoint):
    with pytest.raises(ConfigError, match=r"Q4_K_M is a llama.cpp weight type|only fp32 models"):
        runtime.check(LlamaQuantize().plan(checkpoint.spec))


def test_torch_rejects_quantized_weights(checkpoint):
    with pytest.raises(ConfigError, match="only fp32 models"):
        Torch().check(Quantize().plan(checkpoint.spec))
