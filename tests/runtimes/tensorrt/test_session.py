"""Test TensorRT engines with a fake library that computes on the CPU: build, inference and load checks."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from support import fake_tensorrt, stages
from support.tensorrt_engines import H200, FakeGpu, build_engine, open_engine

from edgeopt.checkpoints import modeling
from edgeopt.core.artifact import Engine
from edgeopt.errors import BuildError
from edgeopt.measure.stats.divergence import relative_error
from edgeopt.runtimes.tensorrt import plan as plans
from edgeopt.runtimes.tensorrt.engine_identity import IDENTITY_FILE, EngineIdentity
from edgeopt.runtimes.tensorrt.gpu import GpuIdentity
from edgeopt.runtimes.tensorrt.runtime import TensorRt

PROMPT = [1, 17, 42, 99, 7]


@pytest.fixture(scope="module")
def engine(planned, tmp_path_factory) -> Engine:
    return build_engine(planned, tmp_path_factory.mktemp("engines") / "engine")


class TestInference:
    def test_logits_match_checkpoint(self, engine, int4_checkpoint):
        expected = modeling.load(int4_checkpoint)(torch.tensor([PROMPT])).logits[0].numpy()
        assert relative_error(expected, open_engine(engine).logits(PROMPT)) < 5e-3

    def test_fp32_logits_match_checkpoint_closely(self, checkpoint, tmp_path):
        runtime = TensorRt(numbers="fp32")
        engine = build_engine(stages.build_engine(runtime, checkpoint, tmp_path / "plan"), tmp_path / "engine", runtime)
        expected = modeling.load(checkpoint)(torch.tensor([PROMPT])).logits[0].numpy()
        assert relative_error(expected, open_engine(engine, runtime=runtime).logits(PROMPT)) < 1e-4

    def test_fp32_units_keep_fp32_weights(self, checkpoint, tmp_path):
        runtime = TensorRt(in_fp32=("layers.*.down", "lm_head"))
        engine = stages.build_engine(runtime, checkpoint, tmp_path / "plan")
        matrices = [t for t in onnx.load(engine.directory / "model.onnx").graph.initializer if len(t.dims) == 2]
        fp32_shapes = [tuple(t.dims) for t in matrices if t.data_type == onnx.TensorProto.FLOAT]
        fp16_shapes = [tuple(t.dims) for t in matrices if t.data_type == onnx.TensorProto.FLOAT16]
        assert fp32_shapes.count((128, 64)) == 2, "down of both layers"
        assert any(300 in shape for shape in fp32_shapes), "the embedding table"
        assert fp16_shapes.count((64, 128)) == 4, "gate and up of both layers"
        expected = modeling.load(checkpoint)(torch.tensor([PROMPT])).logits[0].numpy()
        session = open_engine(build_engine(engine, tmp_path / "engine", runtime), runtime=runtime)
        assert relative_error(expected, session.logits(PROMPT)) < 5e-3

    def test_generation_follows_logits(self, engine):
        session = open_engine(engine)
        tokens = list(PROMPT)
        for token in session.generate(PROMPT, 6, stop_at_end=False):
            scores = session.logits(tokens)[-1]
            assert scores[token] >= np.sort(scores)[-2] - 1e-2 * np.abs(scores).max()
            tokens.append(token)
        assert len(tokens) == len(PROMPT) + 6

    def test_prompt_chunks_do_not_change_logits(self, checkpoint, tmp_path):
        runtime = TensorRt(numbers="fp32", prompt_tokens=2)
        engine = build_engine(stages.build_engine(runtime, checkpoint, tmp_path / "plan"), tmp_path / "engine", runtime)
        expected = modeling.load(checkpoint)(torch.tensor([PROMPT])).logits[0].numpy()
        assert relative_error(expected, open_engine(engine, runtime=runtime).logits(PROMPT)) < 1e-4

    def test_decoding_captures_one_graph_per_cache(self, engine):
        gpu = FakeGpu()
        list(open_engine(engine, gpu).generate(PROMPT, 12, stop_at_end=False))
        assert gpu.captured_graphs == 2
        list(open_engine(engine, gpu, TensorRt(cuda_graphs=False)).generate(PROMPT, 12, stop_at_end=False))
        assert gpu.captured_graphs == 2


class TestBuild:
    def test_settings_reach_builder_config(self, planned, tmp_path):
        runtime = TensorRt(
            refit=True, version_compatible=True, weights_mib=64, workspace_mib=128, hardware="ampere_plus"
        )
        build_engine(planned, tmp_path / "engine", runtime)
        settings = fake_tensorrt.build_log[-1]
        assert set(settings["flags"]) == {"REFIT", "VERSION_COMPATIBLE", "WEIGHT_STREAMING"}
        assert settings["pool_limits"] == {"WORKSPACE": 128 * 2**20}
        assert settings["hardware"] == "AMPERE_PLUS"

    def test_timing_cache_is_reused(self, planned, tmp_path, timing_cache):
        for name in ("first", "second"):
            build_engine(planned, tmp_path / name)
        (file,) = timing_cache.iterdir()
        assert file.name == "NVIDIA-H200-11.4.0.106.times"
        assert file.read_bytes() == b".."

    def test_build_failure_includes_tensorrt_message(self, planned, tmp_path):
        with pytest.raises(BuildError, match="no kernel fits the workspace limit"):
            build_engine(planned, tmp_path / "engine", TensorRt(workspace_mib=1))


class TestLoadChecks:
    def load_error(self, engine: Engine, gpu: GpuIdentity = H200) -> str:
        with pytest.raises(BuildError) as error:
            open_engine(engine, FakeGpu(gpu))
        return error.value.message

    @pytest.fixture
    def copied(self, engine: Engine, tmp_path: Path) -> Engine:
        """Return a copy of the engine that a test may damage."""
        shutil.copytree(engine.directory, tmp_path / "engine")
        return replace(engine, directory=tmp_path / "engine")

    def test_different_gpu_is_rejected(self, engine):
        message = self.load_error(engine, GpuIdentity(name="Orin", compute_capability="8.7", cuda="12.6"))
        assert "the engine was built for NVIDIA H200, got Orin" in message
        assert "the engine requires compute capability 9.0, got 8.7" in message

    def test_different_tensorrt_version_is_rejected(self, engine, monkeypatch):
        monkeypatch.setattr(fake_tensorrt, "__version__", "11.5.0.2")
        assert "the engine requires TensorRT 11.4.0.106, got 11.5.0.2" in self.load_error(engine)

    @pytest.mark.parametrize(("version", "loads"), [("11.5.0.2", True), ("11.3.0.1", False), ("12.0.0.1", False)])
    def test_version_compatible_engine_loads_in_later_versions(self, planned, tmp_path, monkeypatch, version, loads):
        engine = build_engine(planned, tmp_path / "engine", TensorRt(version_compatible=True))
        monkeypatch.setattr(fake_tensorrt, "__version__", version)
        if loads:
            open_engine(engine)
        else:
            assert "requires TensorRT 11.4.0.106 or a later 11.x" in self.load_error(engine)

    @pytest.mark.parametrize(
        ("hardware", "capability", "message"),
        [
            ("ampere_plus", "8.6", ""),
            ("ampere_plus", "7.5", "requires compute capability 8.0 or higher"),
            ("same_compute_capability", "9.0", ""),
            ("same_compute_capability", "8.9", "requires compute capability 9.0, got 8.9"),
        ],
    )
    def test_hardware_compatible_engine_loads_on_other_gpus(self, planned, tmp_path, hardware, capability, message):
        engine = build_engine(planned, tmp_path / "engine", TensorRt(hardware=hardware))
        other = GpuIdentity(name="another", compute_capability=capability, cuda="13.0")
        if message:
            assert message in self.load_error(engine, other)
        else:
            open_engine(engine, FakeGpu(other))

    def test_truncated_engine_is_rejected(self, copied):
        path = copied.directory / plans.ENGINE_FILE
        path.write_bytes(path.read_bytes()[:-7])
        assert "model.engine is truncated" in self.load_error(copied)

    def test_modified_engine_is_rejected(self, copied):
        path = copied.directory / plans.ENGINE_FILE
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        assert "its SHA-256 digest differs" in self.load_error(copied)

    def test_engine_of_different_graph_is_rejected(self, copied):
        identity = replace(EngineIdentity.read(copied.directory), graph_sha256="0" * 64)
        identity.write(copied.directory)
        assert "from a different graph" in self.load_error(copied)

    def test_tensorrt_load_failure_includes_message(self, copied):
        path = copied.directory / plans.ENGINE_FILE
        settings = json.loads(path.read_bytes()) | {"graph": "gone"}
        path.write_bytes(json.dumps(settings).encode())
        plan = plans.read(copied.directory)
        EngineIdentity.of_build(plan, copied.directory, tensorrt="11.4.0.106", gpu=H200).write(copied.directory)
        assert "the engine belongs to another machine" in self.load_error(copied)

    def test_unreadable_identity_is_rejected(self, copied):
        (copied.directory / IDENTITY_FILE).write_text("[]")
        assert "identity is unreadable" in self.load_error(copied)
