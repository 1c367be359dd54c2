"""Test prepacked and mapped weights: their logits, and the memory that processes share."""

import mmap
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.stages import apply_step, build_engine, predict_metric

from edgeopt.compress.quantization.quantize import Quantize
from edgeopt.core.artifact import Checkpoint, Engine
from edgeopt.core.target import Target
from edgeopt.errors import BuildError, ConfigError
from edgeopt.runtimes.genai.runtime import Genai
from edgeopt.runtimes.onnx import graph, shards
from edgeopt.runtimes.onnx.runtime import PortableOnnx
from edgeopt.runtimes.onnxruntime_common import mapped_memory, prepacked_weights
from runtimes.test_families import PROMPT

MIB, SIZE, COUNT = 2**20, 1024, 16
RUNTIMES = {"genai": Genai(), "onnx": PortableOnnx()}


@pytest.fixture(scope="module")
def quantized(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return apply_step(
        Quantize(weights="int4", symmetric=True), checkpoint, tmp_path_factory.mktemp("quantized") / "checkpoint"
    )


@pytest.fixture(scope="module", params=RUNTIMES.values(), ids=RUNTIMES.keys())
def packed_and_plain(request, quantized, tmp_path_factory) -> tuple[Genai | PortableOnnx, Engine, Engine]:
    """Return a runtime that prepacks weights on disk, its engine, and an engine without prepacked weights."""
    folder, plain = tmp_path_factory.mktemp("engines"), request.param
    runtime = replace(plain, packed_on_disk=True)
    return (
        runtime,
        build_engine(runtime, quantized, folder / "packed"),
        build_engine(plain, quantized, folder / "plain"),
    )


def test_prepacked_engine_computes_the_same(packed_and_plain) -> None:
    runtime, packed, plain = packed_and_plain
    result, expected = (
        (session.logits(PROMPT), list(session.generate(PROMPT[:40], 8, stop_at_end=False)))
        for session in (runtime.open(packed, threads=1), replace(runtime, packed_on_disk=False).open(plain, threads=1))
    )
    assert np.array_equal(result[0], expected[0])
    assert result[1] == expected[1]


def test_prepacked_file_keeps_original_weights(packed_and_plain) -> None:
    _, packed, plain = packed_and_plain
    packed_bytes, plain_bytes = ((engine.directory / graph.WEIGHTS_FILE).stat().st_size for engine in (packed, plain))
    assert 1.5 * plain_bytes < packed_bytes < 4 * plain_bytes


def test_predicted_size_includes_prepacked_copy(packed_and_plain) -> None:
    runtime, packed, plain = packed_and_plain
    for configured, engine in ((runtime, packed), (replace(runtime, packed_on_disk=False), plain)):
        (size,) = predict_metric(configured, engine)
        assert size.low < engine.size_bytes / MIB < size.high


def test_prepacked_weights_disable_memory_prediction(checkpoint) -> None:
    model_and_target = checkpoint.spec, Target(name="device", context_length=64)
    predicted = {m.metric for m in Genai(packed_on_disk=True).predict(*model_and_target, copied_bytes=0)}
    assert predicted == {m.metric for m in Genai().predict(*model_and_target, copied_bytes=0)} - {"memory/peak_rss_mib"}
    assert (
        not {"resident", "peak_bytes"} & Genai(packed_on_disk=True).breakdown(*model_and_target, copied_bytes=0).keys()
    )


@pytest.mark.parametrize("budget", ["0 B", "100 kB", "1 GiB"])
def test_prepacked_shards_compute_like_whole_graph(quantized, tmp_path: Path, budget: str) -> None:
    runtime = PortableOnnx(packed_on_disk=True, shards=3, resident=budget)
    engine = build_engine(runtime, quantized, tmp_path / "engine")
    whole, sharded = (r.open(engine, threads=1) for r in (replace(runtime, resident=None), runtime))
    assert np.array_equal(sharded.logits(PROMPT), whole.logits(PROMPT))
    sharded.close()


def test_shard_size_counts_bytes_read_by_kernels(quantized, tmp_path: Path) -> None:
    sizes = {
        packed: sum(
            shard.size_bytes
            for shard in shards.read(
                build_engine(PortableOnnx(shards=3, packed_on_disk=packed), quantized, tmp_path / str(packed)).directory
            )
        )
        for packed in (True, False)
    }
    codes_and_scales = sum(quantized.spec.size_bytes(name) for name in quantized.spec.schemes)
    assert codes_and_scales < sizes[True] < 3 * codes_and_scales
    assert sizes[True] != sizes[False]


@pytest.fixture(scope="module")
def matrices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a graph with COUNT matrix products of 4 MiB of fp32 weights each."""
    folder = tmp_path_factory.mktemp("matrices")
    generator = np.random.default_rng(0)
    weights = [numpy_helper.from_array(generator.random((SIZE, SIZE), np.float32), f"w{n}") for n in range(COUNT)]
    nodes = [helper.make_node("MatMul", [f"x{n}", f"w{n}"], [f"x{n + 1}"]) for n in range(COUNT)]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, SIZE]) for name in ("x0", f"x{COUNT}")]
    model = helper.make_model(helper.make_graph(nodes, "products", values[:1], values[1:], weights), ir_version=10)
    model.opset_import[0].version = 20
    onnx.save(model, folder / graph.GRAPH_FILE, save_as_external_data=True, location=graph.WEIGHTS_FILE)
    return folder


OPEN_AND_RUN = """
import sys
from pathlib import Path
import numpy as np, onnxruntime
from edgeopt.machine.procfs import read_memory
from edgeopt.runtimes.onnxruntime_common.session_options import SessionOptions
from edgeopt.runtimes.onnxruntime_common.mapped_memory import apply_memory_options, collapse_huge_pages

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
before = read_memory()
graph = Path(sys.argv[1])
session = onnxruntime.InferenceSession(graph, options)
data = graph.with_name(graph.name + ".data")
opened = read_memory()
apply_memory_options(data, SessionOptions(packed_on_disk=True))
released = read_memory()
if len(sys.argv) > 2:
    collapse_huge_pages().join()
after = read_memory()
session.run(None, {"x0": np.ones((1, session.get_inputs()[0].shape[1]), np.float32)})
for name in ("rss_bytes", "huge_bytes"):
    print(*((memory[name] - before[name]) / 2**20 for memory in (opened, released, after, read_memory())))
"""


def session_memory_mib(folder: Path, *, collapse: bool = False) -> tuple[list[float], list[float]]:
    """Return the resident memory of a process that opens and runs a graph, and its memory in huge pages.

    Each list has the values after opening, releasing pages, collapsing pages (if `collapse` is true), and a run.
    """
    command = [sys.executable, "-c", OPEN_AND_RUN, str(folder / graph.GRAPH_FILE), *(["collapse"] if collapse else [])]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    resident, huge = (list(map(float, line.split())) for line in lines)
    return resident, huge


def test_only_prepacked_weights_stay_resident(matrices: Path, tmp_path: Path) -> None:
    for file in matrices.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    prepacked_weights.save(tmp_path / graph.GRAPH_FILE)
    weights_mib = COUNT * 4 * SIZE**2 / MIB
    (_, released, _, ran), _ = session_memory_mib(tmp_path)
    assert released < 0.3 * weights_mib  # all weights are mapped from the file
    assert 0.9 * weights_mib < ran < 1.5 * weights_mib  # the prepacked weights, not the original ones
    (_, copied, _, _), _ = session_memory_mib(matrices)
    assert copied > 0.9 * weights_mib  # each process has its own copy


def supports_huge_pages() -> bool:
    try:
        mapped_memory.collapse_huge_pages().join()
    except BuildError:
        return False
    return True


def test_huge_pages_hold_copied_weights(matrices: Path) -> None:
    if not supports_huge_pages():
        pytest.skip("this kernel cannot collapse pages (before Linux 6.1)")
    (_, released, collapsed, _), (_, _, huge, _) = session_memory_mib(matrices, collapse=True)
    assert huge > 0.5 * released
    assert collapsed < 1.1 * released


def test_kernel_without_huge_pages_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_memory, "MADV_COLLAPSE", 0x7FFF)  # unknown to every kernel
    with pytest.raises(BuildError, match=r"runtime\.huge_pages: this kernel cannot collapse pages.*Use false"):
        mapped_memory.collapse_huge_pages()


@pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES.keys())
@pytest.mark.parametrize("field", ["packed_on_disk", "huge_pages"])
def test_packing_options_require_prepacking(runtime, field: str) -> None:
    with pytest.raises(ConfigError, match=f"`{field}` needs prepacked weights.*Use false, or prepacked=true"):
        replace(runtime, prepacked=False, **{field: True})


@pytest.mark.parametrize("option", [{"packed_on_disk": True}, {"huge_pages": True}])
def test_gpu_provider_rejects_memory_options(option) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(option))}: .* requires provider=cpu, got cuda"):
        PortableOnnx(provider="cuda", **option)


@pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES.keys())
def test_prepacking_on_disk_rejects_fp16(runtime, checkpoint) -> None:
    with pytest.raises(ConfigError, match=r"runtime\.packed_on_disk: `packed_on_disk` must be false for fp16 weights"):
        replace(runtime, packed_on_disk=True).check(replace(checkpoint.spec, weight_dtype="fp16"))


def test_baseline_resets_storage_options() -> None:
    assert Genai(packed_on_disk=True, huge_pages=True).baseline == Genai(huge_pages=True)
    for runtime in (Genai(), PortableOnnx()):
        assert replace(runtime, packed_on_disk=True, mapped_weights="locked", prompt_lookup=2).baseline == runtime


def test_invalid_graph_cannot_be_packed(tmp_path: Path) -> None:
    (tmp_path / graph.GRAPH_FILE).write_bytes(b"no graph")
    with pytest.raises(BuildError, match=r"cannot pack the weights of model\.onnx"):
        prepacked_weights.save(tmp_path / graph.GRAPH_FILE)
    assert [file.name for file in tmp_path.iterdir()] == [graph.GRAPH_FILE]


OPEN_RESIDENT = """
import sys
from pathlib import Path
import onnxruntime
from edgeopt.runtimes.onnxruntime_common.mapped_memory import make_resident, mapped_regions

graph = Path(sys.argv[1])
options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.disable_prepacking", "1")
session = onnxruntime.InferenceSession(graph, options)
make_resident(mapped_regions(graph.with_name(graph.name + ".data")), sys.argv[2])
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(int(status["RssFile"].split()[0]) / 2**10, int(status["VmLck"].split()[0]) / 2**10)
"""


def resident_and_locked_mib(folder: Path, mode: str) -> tuple[float, float]:
    """Return the resident and the locked memory of mapped files in a process that has opened a graph."""
    command = [sys.executable, "-c", OPEN_RESIDENT, str(folder / graph.GRAPH_FILE), mode]
    resident, locked = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(resident), float(locked)


def test_mapped_weights_are_prefaulted_or_locked(matrices: Path) -> None:
    weights_mib = COUNT * 4 * SIZE**2 / MIB
    on_demand, prefaulted, locked = (
        resident_and_locked_mib(matrices, mode) for mode in ("on_demand", "prefaulted", "locked")
    )
    assert prefaulted[0] - on_demand[0] > 0.9 * weights_mib
    assert prefaulted[1] == 0
    assert locked[1] > 0.99 * weights_mib


def test_failed_prefault_or_lock_is_reported() -> None:
    for mode, hint in {"prefaulted": "Linux 5.14", "locked": "ulimit -l"}.items():
        with pytest.raises(BuildError, match=rf"runtime\.mapped_weights: the weights cannot be {mode}.*{hint}"):
            mapped_memory.make_resident([(mmap.PAGESIZE, mmap.PAGESIZE)], mode)  # no memory is mapped at this address


@pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES.keys())
def test_copied_weights_reject_mapping_modes(runtime) -> None:
    with pytest.raises(ConfigError, match="`mapped_weights` must be on_demand with prepacked=true"):
        replace(runtime, mapped_weights="locked")


@pytest.mark.parametrize("mode", ["prefaulted", "locked"])
def test_resident_weights_generate_same_tokens(packed_and_plain, mode: str) -> None:
    runtime, packed, _ = packed_and_plain
    tokens, expected = (
        list(configured.open(packed, threads=1).generate(PROMPT[:40], 8, stop_at_end=False))
        for configured in (replace(runtime, mapped_weights=mode), runtime)
    )
    assert tokens == expected


def test_only_resident_shards_are_locked(quantized, tmp_path: Path) -> None:
    runtime = PortableOnnx(packed_on_disk=True, shards=3, resident="1 GiB", mapped_weights="locked")
    engine = build_engine(runtime, quantized, tmp_path / "engine")
    before = locked_bytes()
    session = runtime.open(engine, threads=1)
    assert locked_bytes() > before
    session.close()
    streamed = replace(runtime, resident="0 B").open(engine, threads=1)
    assert locked_bytes() == before
    streamed.close()


def locked_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmLck"))
