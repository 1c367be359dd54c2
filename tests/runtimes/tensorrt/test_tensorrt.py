"""TensorRT engines: plans that are checked without a GPU, and their life on one that computes on the CPU."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from support import fake_tensorrt
from support.workshops import applied, built

from edgeopt.checkpoints import modeling
from edgeopt.checkpoints.importing import import_checkpoint
from edgeopt.cli.main import main
from edgeopt.compress.quantization.int8 import Int8
from edgeopt.compress.quantization.kv_cache import KvCache
from edgeopt.compress.quantization.quantize import Quantize
from edgeopt.core.artifact import Checkpoint, Engine
from edgeopt.errors import BuildError, ConfigError, InputError
from edgeopt.measure.stats.divergence import relative_error
from edgeopt.runtimes.tensorrt import builder, graph
from edgeopt.runtimes.tensorrt import plan as plans
from edgeopt.runtimes.tensorrt.gpu import Identity
from edgeopt.runtimes.tensorrt.identity import FILE, BuiltBy
from edgeopt.runtimes.tensorrt.runtime import TensorRt
from edgeopt.runtimes.tensorrt.session import TensorRtSession
from runtimes.test_families import FAMILIES, random_checkpoint

PROMPT = [1, 17, 42, 99, 7]
USUAL = TensorRt()
GPU = Identity(name="NVIDIA H200", compute_capability="9.0", cuda="13.0")


class Host:
    """A GPU that is the host: its memory, and work that is done at once."""

    def __init__(self, identity: Identity = GPU) -> None:
        self.identity, self.location, self.stream = identity, torch.device("cpu"), 1
        self.graphs = 0

    def wait(self) -> None:
        pass

    def captured(self, queue: Callable[[], None]) -> Callable[[], None]:
        self.graphs += 1
        return queue


@pytest.fixture(autouse=True)
def times(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where times of kernels are kept."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "edgeopt" / "tensorrt"


@pytest.fixture(scope="module")
def int4(checkpoint, tmp_path_factory) -> Checkpoint:
    step = Quantize(weights="int4", lm_head="int4", embedding="float", symmetric=True)
    return applied(step, checkpoint, tmp_path_factory.mktemp("int4") / "checkpoint")


@pytest.fixture(scope="module")
def planned(int4, tmp_path_factory) -> Engine:
    return built(TensorRt(), int4, tmp_path_factory.mktemp("plans") / "plan")


def finished(planned: Engine, directory: Path, runtime: TensorRt = USUAL) -> Engine:
    """The engine of a plan, by the TensorRT that computes on the CPU."""
    shutil.copytree(planned.directory, directory)
    plan = replace(plans.read(directory), runtime=runtime)
    plan.write(directory)
    builder.build(plan, directory, trt=fake_tensorrt, gpu=Host(), progress=lambda _: None)
    return Engine.seal(directory, format=planned.format, spec=planned.spec, made_by=planned.made_by)


def opened(engine: Engine, gpu: Host | None = None, runtime: TensorRt = USUAL) -> TensorRtSession:
    return TensorRtSession(engine, runtime, BuiltBy.read(engine.directory), trt=fake_tensorrt, gpu=gpu or Host())


class TestAPlanWithoutAGpu:
    def test_of_a_rounded_llama_passes_all_checks(self, planned):
        plans.read(planned.directory).check()
        kinds = {node.op_type for node in onnx.load(planned.directory / "model.onnx").graph.node}
        assert "DequantizeLinear" in kinds
        assert "Cast" not in {
            n.op_type
            for n in onnx.load(planned.directory / "model.onnx").graph.node
            if any(".scales" in name for name in n.input)
        }

    def test_says_in_one_sentence_that_it_is_one(self, int4, tmp_path):
        told: list[str] = []
        tmp_path.joinpath("plan").mkdir()
        TensorRt().build(int4, tmp_path / "plan", told.append)
        assert told[-1] == (
            "TensorRT or its GPU is not here: this is a plan, from which edgeopt build-plan makes an engine"
        )
        assert not (tmp_path / "plan" / plans.ENGINE).exists()

    def test_names_the_line_of_trtexec_that_does_the_same(self, planned):
        line = json.loads((planned.directory / plans.FILE).read_text())["trtexec"]
        assert line.startswith(
            "trtexec --onnx=model.onnx --saveEngine=model.engine --profile=0 --minShapes=input_ids:1x1,"
        )
        assert "--profile=1 --minShapes=input_ids:1x1,rows:1,past_key_values.0.key:1x2x1x16" in line
        assert "--maxShapes=input_ids:1x1,rows:1," in line
        assert "--stronglyTyped" not in line
        older = replace(plans.read(planned.directory), runtime=TensorRt(version="10.3", hardware="ampere_plus"))
        assert "--stronglyTyped" in older.trtexec
        assert "--hardwareCompatibilityLevel=amperePlus" in older.trtexec

    def test_opening_it_says_how_it_becomes_an_engine(self, planned):
        with pytest.raises(BuildError, match=r"plan of a TensorRT engine\. Build it on its device: edgeopt build-plan"):
            TensorRt().open(planned, threads=1)

    def test_calibrated_ranges_are_part_of_it_and_of_its_graph(self, checkpoint, tmp_path):
        source = applied(Int8(ranges="min_max", windows=2, window_tokens=32), checkpoint, tmp_path / "source")
        engine = built(TensorRt(), source, tmp_path / "plan")
        ranges = json.loads((engine.directory / plans.FILE).read_text())["input_ranges"]
        scale, middle = json.loads((source.directory / modeling.INPUT_RANGES).read_text())["layers.0.qkv"]
        assert ranges["layers.0.qkv"] == pytest.approx(scale * max(middle, 255 - middle))
        stored = {t.name: t for t in onnx.load(engine.directory / "model.onnx").graph.initializer}
        kept = float(onnx.numpy_helper.to_array(stored["layers.0.qkv.input.scale"]))
        assert kept * 127 == pytest.approx(ranges["layers.0.qkv"], rel=1e-3)

    def test_has_what_an_older_tensorrt_knows_where_it_is_for_that(self, int4, tmp_path):
        engine = built(TensorRt(version="10.3"), int4, tmp_path / "plan")
        model = onnx.load(engine.directory / "model.onnx")
        assert model.opset_import[0].version == 21
        assert not {node.op_type for node in model.graph.node} & graph.SINCE.keys()

    @pytest.mark.slow
    @pytest.mark.parametrize("family", ["qwen3", "gemma3", "mistral"])
    def test_of_other_families_passes_all_checks(self, family, tiny_model, tmp_path):
        for name in ("model", "source"):
            tmp_path.joinpath(name).mkdir()
        source = import_checkpoint(
            random_checkpoint(*FAMILIES[family], tiny_model, tmp_path / "model"), tmp_path / "source"
        )
        plans.read(built(TensorRt(), source, tmp_path / "plan").directory).check()


def change(engine: Engine, directory: Path, edit: Callable[[onnx.ModelProto], None]) -> plans.Plan:
    """The plan with another graph."""
    shutil.copytree(engine.directory, directory)
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    edit(model)
    onnx.save(model, directory / "model.onnx")
    plan = plans.read(directory)
    return replace(plan, graph_sha256=plans.sha256_of(plan.graph))


class TestWhatAPlansChecksFind:
    def test_a_graph_that_was_changed_after_it_was_planned(self, planned, tmp_path):
        plan = change(planned, tmp_path / "plan", lambda model: model.graph.node[0].ClearField("doc_string"))
        plan.graph.write_bytes(plan.graph.read_bytes() + b"\n")
        with pytest.raises(BuildError, match="the graph was changed since it was planned"):
            plan.check()

    def test_an_operator_that_tensorrt_has_not(self, planned, tmp_path):
        def edit(model: onnx.ModelProto) -> None:
            next(node for node in model.graph.node if node.op_type == "MatMul").op_type = "MatMulInteger"

        with pytest.raises(BuildError, match=r"MatMulInteger|no valid ONNX"):
            change(planned, tmp_path / "plan", edit).check()

    def test_an_operator_of_a_later_version(self, planned):
        found = graph.faults(planned.directory / "model.onnx", (10, 13))
        assert "TensorRT 10.13 has no operator Attention, which came with 10.14" in found

    def test_a_zero_point_that_is_not_zero(self, planned, tmp_path):
        def edit(model: onnx.ModelProto) -> None:
            node = next(node for node in model.graph.node if node.op_type == "DequantizeLinear")
            stored = {tensor.name: tensor for tensor in model.graph.initializer}
            shape = list(stored[node.input[1]].dims)
            codes = np.ones(int(np.prod(shape)), np.int8).tolist()
            model.graph.initializer.append(onnx.helper.make_tensor("middle", onnx.TensorProto.INT4, shape, codes))
            node.input.append("middle")

        with pytest.raises(BuildError, match=r"the zero-point of .* is not 0"):
            change(planned, tmp_path / "plan", edit).check()

    def test_weights_that_are_cut_off(self, planned, tmp_path):
        plan = change(planned, tmp_path / "plan", lambda model: None)
        data = plan.graph.with_name("model.onnx.data")
        data.write_bytes(data.read_bytes()[:-100])
        with pytest.raises(BuildError, match=r"ends behind the end of model.onnx.data|no valid ONNX"):
            plan.check()

    def test_profiles_that_do_not_fit_the_graph(self, planned):
        plan = plans.read(planned.directory)
        ranges = dict(plan.profiles[plans.DECODE])
        falling = ranges | {"rows": ((2,), (1,), (1,))}
        closed = ranges | {"past_key_values.0.key": ((1, 3, 1, 16),) * 3}
        missing = {name: shapes for name, shapes in ranges.items() if name != "input_ids"}
        for wrong, said in ((falling, "gives rows"), (closed, "past_key_values.0.key"), (missing, "for input_ids")):
            with pytest.raises(BuildError, match=said):
                replace(plan, profiles={plans.DECODE: wrong}).check()

    def test_a_plan_that_cannot_be_read(self, planned, tmp_path):
        with pytest.raises(InputError, match="no plan is here"):
            plans.read(tmp_path)
        (tmp_path / plans.FILE).write_text("{}")
        with pytest.raises(InputError, match="the plan cannot be read"):
            plans.read(tmp_path)


class TestWhatIsRefusedBeforeAnyWork:
    @pytest.mark.parametrize(
        ("step", "said"),
        [
            (Quantize(weights="int4", embedding="float", symmetric=False), "not symmetric.*symmetric=true"),
            (Quantize(weights="int4", lm_head="int8", embedding="int8", symmetric=True), "embedding=float|in blocks"),
            (Quantize(weights="int8", embedding="float", symmetric=True), "int8_activations"),
            (Int8(), "ranges of calibration text"),
            (KvCache(), "no keys and values on a grid"),
        ],
    )
    def test_grids_that_tensorrt_does_not_take(self, step, said, checkpoint):
        with pytest.raises(ConfigError, match=said):
            TensorRt().check(step.plan(checkpoint.spec))

    def test_all_that_is_wrong_with_them_at_once(self, checkpoint):
        spec = Quantize(weights="int4", lm_head="int8", embedding="int8").plan(checkpoint.spec)
        with pytest.raises(
            ConfigError, match=r"not symmetric; .* a table on a grid.*symmetric=true\..*embedding=float"
        ):
            TensorRt().check(spec)

    def test_units_that_are_not_there(self, checkpoint):
        with pytest.raises(ConfigError, match=r"no unit is called 'layers.9.down'"):
            TensorRt(in_fp32=("layers.9.down",)).check(checkpoint.spec)

    @pytest.mark.parametrize(
        "values",
        [{"version": "9.3"}, {"version": "new"}, {"optimization_level": 6}, {"prompt_tokens": 0}, {"weights_mib": -1}],
    )
    def test_values_that_cannot_be(self, values):
        with pytest.raises(ConfigError):
            TensorRt(**values)


class TestAnEngineOnItsGpu:
    @pytest.fixture(scope="class")
    def engine(self, planned, tmp_path_factory):
        return finished(planned, tmp_path_factory.mktemp("engines") / "engine")

    def test_computes_what_its_checkpoint_does(self, engine, int4):
        expected = modeling.load(int4)(torch.tensor([PROMPT])).logits[0].numpy()
        assert relative_error(expected, opened(engine).logits(PROMPT)) < 5e-3

    def test_in_fp32_computes_it_closely(self, checkpoint, tmp_path):
        runtime = TensorRt(numbers="fp32")
        engine = finished(built(runtime, checkpoint, tmp_path / "plan"), tmp_path / "engine", runtime)
        expected = modeling.load(checkpoint)(torch.tensor([PROMPT])).logits[0].numpy()
        assert relative_error(expected, opened(engine, runtime=runtime).logits(PROMPT)) < 1e-4

    def test_units_that_stay_in_fp32_keep_their_weights_so(self, checkpoint, tmp_path):
        runtime = TensorRt(in_fp32=("layers.*.down", "lm_head"))
        engine = built(runtime, checkpoint, tmp_path / "plan")
        matrices = [t for t in onnx.load(engine.directory / "model.onnx").graph.initializer if len(t.dims) == 2]
        in_fp32 = [tuple(t.dims) for t in matrices if t.data_type == onnx.TensorProto.FLOAT]
        in_fp16 = [tuple(t.dims) for t in matrices if t.data_type == onnx.TensorProto.FLOAT16]
        assert in_fp32.count((128, 64)) == 2, "down of both layers"
        assert any(300 in sides for sides in in_fp32), "the table"
        assert in_fp16.count((64, 128)) == 4, "gate and up of both layers"
        expected = modeling.load(checkpoint)(torch.tensor([PROMPT])).logits[0].numpy()
        session = opened(finished(engine, tmp_path / "engine", runtime), runtime=runtime)
        assert relative_error(expected, session.logits(PROMPT)) < 5e-3

    def test_generates_what_its_logits_say(self, engine):
        session = opened(engine)
        tokens = list(PROMPT)
        for token in session.generate(PROMPT, 6, stop_at_end=False):
            scores = session.logits(tokens)[-1]
            assert scores[token] >= np.sort(scores)[-2] - 1e-2 * np.abs(scores).max()
            tokens.append(token)
        assert len(tokens) == len(PROMPT) + 6

    def test_reads_a_prompt_in_parts_as_long_as_its_profile_allows(self, checkpoint, tmp_path):
        runtime = TensorRt(numbers="fp32", prompt_tokens=2)
        engine = finished(built(runtime, checkpoint, tmp_path / "plan"), tmp_path / "engine", runtime)
        expected = modeling.load(checkpoint)(torch.tensor([PROMPT])).logits[0].numpy()
        assert relative_error(expected, opened(engine, runtime=runtime).logits(PROMPT)) < 1e-4

    def test_launches_decoding_as_two_graphs_one_for_each_side_of_the_cache(self, engine):
        gpu = Host()
        list(opened(engine, gpu).generate(PROMPT, 12, stop_at_end=False))
        assert gpu.graphs == 2
        list(opened(engine, gpu, TensorRt(cuda_graphs=False)).generate(PROMPT, 12, stop_at_end=False))
        assert gpu.graphs == 2

    def test_is_built_as_its_settings_say(self, planned, tmp_path):
        runtime = TensorRt(
            refit=True, version_compatible=True, weights_mib=64, workspace_mib=128, hardware="ampere_plus"
        )
        finished(planned, tmp_path / "engine", runtime)
        made = fake_tensorrt.built[-1]
        assert set(made["flags"]) == {"REFIT", "VERSION_COMPATIBLE", "WEIGHT_STREAMING"}
        assert made["pools"] == {"WORKSPACE": 128 * 2**20}
        assert made["hardware"] == "AMPERE_PLUS"

    def test_keeps_times_of_kernels_for_the_next(self, planned, tmp_path, times):
        for name in ("one", "two"):
            finished(planned, tmp_path / name)
        (kept,) = times.iterdir()
        assert kept.name == "NVIDIA-H200-11.4.0.106.times"
        assert kept.read_bytes() == b".."

    def test_that_cannot_be_built_says_what_tensorrt_said(self, planned, tmp_path):
        with pytest.raises(BuildError, match="no kernel runs in so little workspace"):
            finished(planned, tmp_path / "engine", TensorRt(workspace_mib=1))


class TestAnEngineThatIsRefused:
    @pytest.fixture(scope="class")
    def engine(self, planned, tmp_path_factory):
        return finished(planned, tmp_path_factory.mktemp("engines") / "engine")

    def refusal(self, engine: Engine, gpu: Identity = GPU) -> str:
        with pytest.raises(BuildError) as refused:
            opened(engine, Host(gpu))
        return refused.value.message

    def test_on_another_gpu(self, engine):
        said = self.refusal(engine, Identity(name="Orin", compute_capability="8.7", cuda="12.6"))
        assert "it was built for NVIDIA H200, and here is Orin" in said
        assert "it was built for compute capability 9.0, not 8.7" in said

    def test_by_another_version_of_tensorrt(self, engine, monkeypatch):
        monkeypatch.setattr(fake_tensorrt, "__version__", "11.5.0.2")
        assert "built by TensorRT 11.4.0.106 and loads with that, and here is 11.5.0.2" in self.refusal(engine)

    @pytest.mark.parametrize(("here", "loads"), [("11.5.0.2", True), ("11.3.0.1", False), ("12.0.0.1", False)])
    def test_unless_it_is_compatible_with_later_ones(self, planned, tmp_path, monkeypatch, here, loads):
        engine = finished(planned, tmp_path / "engine", TensorRt(version_compatible=True))
        monkeypatch.setattr(fake_tensorrt, "__version__", here)
        if loads:
            opened(engine)
        else:
            assert "loads with that or later" in self.refusal(engine)

    @pytest.mark.parametrize(
        ("hardware", "capability", "said"),
        [
            ("ampere_plus", "8.6", ""),
            ("ampere_plus", "7.5", "from compute capability 8.0 on"),
            ("same_compute_capability", "9.0", ""),
            ("same_compute_capability", "8.9", "built for compute capability 9.0"),
        ],
    )
    def test_unless_it_is_compatible_with_other_gpus(self, planned, tmp_path, hardware, capability, said):
        engine = finished(planned, tmp_path / "engine", TensorRt(hardware=hardware))
        other = Identity(name="another", compute_capability=capability, cuda="13.0")
        if said:
            assert said in self.refusal(engine, other)
        else:
            opened(engine, Host(other))

    def test_that_was_cut_off(self, engine, tmp_path):
        shutil.copytree(engine.directory, tmp_path / "engine")
        path = tmp_path / "engine" / plans.ENGINE
        path.write_bytes(path.read_bytes()[:-7])
        assert "it was cut off" in self.refusal(replace(engine, directory=tmp_path / "engine"))

    def test_whose_bytes_were_changed(self, engine, tmp_path):
        shutil.copytree(engine.directory, tmp_path / "engine")
        path = tmp_path / "engine" / plans.ENGINE
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        assert "its sha256 differs" in self.refusal(replace(engine, directory=tmp_path / "engine"))

    def test_of_another_graph(self, engine, tmp_path):
        shutil.copytree(engine.directory, tmp_path / "engine")
        identity = replace(BuiltBy.read(tmp_path / "engine"), graph_sha256="0" * 64)
        identity.write(tmp_path / "engine")
        assert "from another graph" in self.refusal(replace(engine, directory=tmp_path / "engine"))

    def test_that_tensorrt_itself_refuses(self, engine, tmp_path):
        shutil.copytree(engine.directory, tmp_path / "engine")
        path = tmp_path / "engine" / plans.ENGINE
        made = json.loads(path.read_bytes()) | {"graph": "gone"}
        path.write_bytes(json.dumps(made).encode())
        plan = plans.read(tmp_path / "engine")
        BuiltBy.of(plan, tmp_path / "engine", tensorrt="11.4.0.106", gpu=GPU).write(tmp_path / "engine")
        assert "the engine is of another machine" in self.refusal(replace(engine, directory=tmp_path / "engine"))

    def test_whose_identity_cannot_be_read(self, engine, tmp_path):
        shutil.copytree(engine.directory, tmp_path / "engine")
        (tmp_path / "engine" / FILE).write_text("[]")
        assert "identity cannot be read" in self.refusal(replace(engine, directory=tmp_path / "engine"))


def test_build_plan_without_a_gpu_says_so_and_ends_with_1(planned, tmp_path, capsys):
    assert main(["build-plan", str(planned.directory), "--out", str(tmp_path / "engine")]) == BuildError.exit_code
    assert "there is no NVIDIA GPU here" in capsys.readouterr().err
    assert not (tmp_path / "engine").exists()


def test_build_plan_refuses_a_folder_that_is_not_empty(planned, capsys):
    assert main(["build-plan", str(planned.directory), "--out", str(planned.directory)]) == InputError.exit_code
    assert "the folder is not empty" in capsys.readouterr().err


STUB = "void *{}(void) {{ return 0; }}"
LISTED = """
import inspect, json, tensorrt_bindings as trt
names = {name: dir(value) for name, value in vars(trt).items() if inspect.isclass(value)}
print(json.dumps({"version": trt.__version__, "names": names}))
"""


@pytest.fixture(scope="module")
def bindings(tmp_path_factory) -> dict[str, list[str]]:
    """Classes of TensorRT's own bindings and their members: loaded beside libraries that have their names alone."""
    if find_spec("tensorrt_bindings") is None or shutil.which("cc") is None:
        pytest.skip("TensorRT's bindings or a C compiler are not here")
    folder = tmp_path_factory.mktemp("bindings")
    spec = find_spec("tensorrt_bindings")
    library = Path(str(spec.origin)).with_name("tensorrt.so")
    wanted = {name.decode() for name in re.findall(rb"libnv[a-z_]+\.so\.\d+", library.read_bytes())}
    missing = re.compile(r"undefined symbol: (\w+)")
    symbols: list[str] = []
    for _ in range(40):
        source = folder / "stub.c"
        source.write_text("\n".join(map(STUB.format, symbols)) + "\n")
        for name in wanted:
            subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", folder / name, source], check=True)
        done = subprocess.run(
            [sys.executable, "-c", LISTED],
            env={"LD_LIBRARY_PATH": str(folder), "LD_BIND_NOW": "", "PATH": ""},
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            found = json.loads(done.stdout)
            assert found["version"].startswith("11.4")
            return found["names"]
        told = missing.search(done.stderr)
        assert told, done.stderr
        symbols.append(told[1])
    raise AssertionError(symbols)


def test_each_name_that_is_used_of_tensorrt_exists_in_its_bindings(bindings):
    classes = {
        name: [member for member in vars(value) if not member.startswith("_")]
        for name, value in inspect.getmembers(fake_tensorrt, inspect.isclass)
        if value.__module__ == fake_tensorrt.__name__
    }
    assert "IExecutionContext" in classes
    unknown = {f"{name}.{m}" for name, members in classes.items() for m in members if m not in bindings.get(name, [])}
    assert not unknown
