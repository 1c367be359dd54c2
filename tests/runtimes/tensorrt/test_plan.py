"""Test TensorRT build plans: their content, and the checks that find faults without a GPU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.stages import apply_step, build_engine

from edgeopt.checkpoints import modeling
from edgeopt.checkpoints.importing import import_checkpoint
from edgeopt.compress.quantization.int8 import Int8
from edgeopt.core.artifact import Engine
from edgeopt.errors import BuildError, InputError
from edgeopt.runtimes.tensorrt import graph_checks
from edgeopt.runtimes.tensorrt import plan as plans
from edgeopt.runtimes.tensorrt.runtime import TensorRt
from runtimes.test_families import FAMILIES, random_checkpoint


class TestPlan:
    def test_plan_of_quantized_llama_passes_checks(self, planned):
        plans.read(planned.directory).check()
        kinds = {node.op_type for node in onnx.load(planned.directory / "model.onnx").graph.node}
        assert "DequantizeLinear" in kinds
        assert "Cast" not in {
            n.op_type
            for n in onnx.load(planned.directory / "model.onnx").graph.node
            if any(".scales" in name for name in n.input)
        }

    def test_build_without_gpu_reports_plan(self, int4_checkpoint, tmp_path):
        messages: list[str] = []
        tmp_path.joinpath("plan").mkdir()
        TensorRt().build(int4_checkpoint, tmp_path / "plan", messages.append)
        assert messages[-1] == (
            "this machine has no NVIDIA GPU or no TensorRT: wrote a build plan instead of an engine. "
            "Build the engine on the device with `edgeopt build-plan DIR`"
        )
        assert not (tmp_path / "plan" / plans.ENGINE_FILE).exists()

    def test_plan_contains_trtexec_command(self, planned):
        line = json.loads((planned.directory / plans.PLAN_FILE).read_text())["trtexec"]
        assert line.startswith(
            "trtexec --onnx=model.onnx --saveEngine=model.engine --profile=0 --minShapes=input_ids:1x1,"
        )
        assert "--profile=1 --minShapes=input_ids:1x1,rows:1,past_key_values.0.key:1x2x1x16" in line
        assert "--maxShapes=input_ids:1x1,rows:1," in line
        assert "--stronglyTyped" not in line
        older = replace(plans.read(planned.directory), runtime=TensorRt(version="10.3", hardware="ampere_plus"))
        assert "--stronglyTyped" in older.trtexec
        assert "--hardwareCompatibilityLevel=amperePlus" in older.trtexec

    def test_opening_plan_names_build_command(self, planned):
        with pytest.raises(BuildError, match=r"build plan, not an engine\. Build .* with `edgeopt build-plan"):
            TensorRt().open(planned, threads=1)

    def test_plan_and_graph_contain_calibrated_ranges(self, checkpoint, tmp_path):
        source = apply_step(Int8(ranges="min_max", windows=2, window_tokens=32), checkpoint, tmp_path / "source")
        engine = build_engine(TensorRt(), source, tmp_path / "plan")
        ranges = json.loads((engine.directory / plans.PLAN_FILE).read_text())["input_ranges"]
        scale, zero_point = json.loads((source.directory / modeling.INPUT_RANGES).read_text())["layers.0.qkv"]
        assert ranges["layers.0.qkv"] == pytest.approx(scale * max(zero_point, 255 - zero_point))
        constants = {t.name: t for t in onnx.load(engine.directory / "model.onnx").graph.initializer}
        graph_scale = float(onnx.numpy_helper.to_array(constants["layers.0.qkv.input.scale"]))
        assert graph_scale * 127 == pytest.approx(ranges["layers.0.qkv"], rel=1e-3)

    def test_plan_for_older_tensorrt_uses_opset_21(self, int4_checkpoint, tmp_path):
        engine = build_engine(TensorRt(version="10.3"), int4_checkpoint, tmp_path / "plan")
        model = onnx.load(engine.directory / "model.onnx")
        assert model.opset_import[0].version == 21
        assert not {node.op_type for node in model.graph.node} & graph_checks.ADDED_OPERATORS.keys()

    @pytest.mark.slow
    @pytest.mark.parametrize("family", ["qwen3", "gemma3", "mistral"])
    def test_plans_of_other_families_pass_checks(self, family, tiny_model, tmp_path):
        for name in ("model", "source"):
            tmp_path.joinpath(name).mkdir()
        source = import_checkpoint(
            random_checkpoint(*FAMILIES[family], tiny_model, tmp_path / "model"), tmp_path / "source"
        )
        plans.read(build_engine(TensorRt(), source, tmp_path / "plan").directory).check()


def edit_graph(engine: Engine, directory: Path, edit: Callable[[onnx.ModelProto], None]) -> plans.Plan:
    """Copy a plan, apply `edit` to its graph, and return the plan with the digest of the edited graph."""
    shutil.copytree(engine.directory, directory)
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    edit(model)
    onnx.save(model, directory / "model.onnx")
    plan = plans.read(directory)
    return replace(plan, graph_sha256=plans.sha256_of(plan.graph))


class TestPlanChecks:
    def test_graph_modified_after_planning_is_rejected(self, planned, tmp_path):
        plan = edit_graph(planned, tmp_path / "plan", lambda model: model.graph.node[0].ClearField("doc_string"))
        plan.graph.write_bytes(plan.graph.read_bytes() + b"\n")
        with pytest.raises(BuildError, match="the graph was modified after planning"):
            plan.check()

    def test_unsupported_operator_is_rejected(self, planned, tmp_path):
        def edit(model: onnx.ModelProto) -> None:
            next(node for node in model.graph.node if node.op_type == "MatMul").op_type = "MatMulInteger"

        with pytest.raises(BuildError, match=r"MatMulInteger|not valid ONNX"):
            edit_graph(planned, tmp_path / "plan", edit).check()

    def test_operator_of_later_version_is_reported(self, planned):
        faults = graph_checks.find_faults(planned.directory / "model.onnx", (10, 13))
        assert "TensorRT 10.13 does not support the operator Attention, added in 10.14" in faults

    def test_nonzero_zero_point_is_rejected(self, planned, tmp_path):
        def edit(model: onnx.ModelProto) -> None:
            node = next(node for node in model.graph.node if node.op_type == "DequantizeLinear")
            constants = {tensor.name: tensor for tensor in model.graph.initializer}
            shape = list(constants[node.input[1]].dims)
            codes = np.ones(int(np.prod(shape)), np.int8).tolist()
            model.graph.initializer.append(onnx.helper.make_tensor("zero_point", onnx.TensorProto.INT4, shape, codes))
            node.input.append("zero_point")

        with pytest.raises(BuildError, match=r"the zero-point of .* must be 0(;|\.)"):
            edit_graph(planned, tmp_path / "plan", edit).check()

    def test_truncated_weights_are_rejected(self, planned, tmp_path):
        plan = edit_graph(planned, tmp_path / "plan", lambda model: None)
        data = plan.graph.with_name("model.onnx.data")
        data.write_bytes(data.read_bytes()[:-100])
        with pytest.raises(BuildError, match=r"exceeds the end of model.onnx.data|not valid ONNX"):
            plan.check()

    def test_profiles_must_match_graph_inputs(self, planned):
        plan = plans.read(planned.directory)
        ranges = dict(plan.profiles[plans.DECODE])
        falling = ranges | {"rows": ((2,), (1,), (1,))}
        wrong_heads = ranges | {"past_key_values.0.key": ((1, 3, 1, 16),) * 3}
        missing = {name: shapes for name, shapes in ranges.items() if name != "input_ids"}
        for wrong, message in (
            (falling, "the shapes of rows must match"),
            (wrong_heads, "the shapes of past_key_values.0.key must match"),
            (missing, "has no shapes for input_ids"),
        ):
            with pytest.raises(BuildError, match=message):
                replace(plan, profiles={plans.DECODE: wrong}).check()

    def test_missing_or_unreadable_plan_is_rejected(self, planned, tmp_path):
        with pytest.raises(InputError, match="holds no TensorRT build plan"):
            plans.read(tmp_path)
        (tmp_path / plans.PLAN_FILE).write_text("{}")
        with pytest.raises(InputError, match="the build plan is unreadable"):
            plans.read(tmp_path)
