"""Weights that an engine has in the layout of the kernels: the same answers, in memory that processes share."""

import mmap
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.stages import apply_step, build_engine, predicted_figures

from edgeopt.compress.quantization.quantize import Quantize
from edgeopt.core.artifact import Checkpoint, Engine
from edgeopt.core.target import Target
from edgeopt.errors import BuildError, ConfigError
from edgeopt.runtimes.genai.runtime import Genai
from edgeopt.runtimes.onnx import graph, shards
from edgeopt.runtimes.onnx.runtime import PortableOnnx
from edgeopt.runtimes.onnxruntime_common import mapped_memory, prepacked_weights
from runtimes.test_families import PROMPT

MIB, SIDE, COUNT = 2**20, 1024, 16
RUNTIMES = {"genai": Genai(), "onnx": PortableOnnx()}


@pytest.fixture(scope="module")
def rounded(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return apply_step(
        Quantize(weights="int4", symmetric=True), checkpoint, tmp_path_factory.mktemp("rounded") / "checkpoint"
    )


@pytest.fixture(scope="module", params=RUNTIMES.values(), ids=RUNTIMES.keys())
def pair(request, rounded, tmp_path_factory) -> tuple[Genai | PortableOnnx, Engine, Engine]:
    """A runtime that saves packed weights, an engine of it, and one without them."""
    folder, plain = tmp_path_factory.mktemp("engines"), request.param
    runtime = replace(plain, packed_on_disk=True)
    return runtime, build_engine(runtime, rounded, folder / "packed"), build_engine(plain, rounded, folder / "plain")


def test_an_engine_computes_and_generates_the_same_however_its_weights_are_stored(pair) -> None:
    runtime, saved, plain = pair
    found, expected = (
        (one.logits(PROMPT), list(one.generate(PROMPT[:40], 8, stop_at_end=False)))
        for one in (runtime.open(saved, threads=1), replace(runtime, packed_on_disk=False).open(plain, threads=1))
    )
    assert np.array_equal(found[0], expected[0])
    assert found[1] == expected[1]


def test_the_file_has_the_weights_of_the_kernels_beside_those_that_were_given(pair) -> None:
    _, saved, plain = pair
    one, other = ((engine.directory / graph.WEIGHTS_FILE).stat().st_size for engine in (saved, plain))
    assert 1.5 * other < one < 4 * other


def test_their_size_is_known_beforehand(pair) -> None:
    runtime, saved, plain = pair
    for one, engine in ((runtime, saved), (replace(runtime, packed_on_disk=False), plain)):
        (size,) = predicted_figures(one, engine)
        assert size.low < engine.size_bytes / MIB < size.high


def test_what_is_not_known_of_packed_weights_is_not_predicted(checkpoint) -> None:
    given = checkpoint.spec, Target(name="device", context_length=64)
    told = {m.metric for m in Genai(packed_on_disk=True).predict(*given, carried_bytes=0)}
    assert told == {m.metric for m in Genai().predict(*given, carried_bytes=0)} - {"memory/peak_rss_mib"}
    assert not {"resident", "peak_bytes"} & Genai(packed_on_disk=True).breakdown(*given, carried_bytes=0).keys()


@pytest.mark.parametrize("budget", ["0 B", "100 kB", "1 GiB"])
def test_shards_of_packed_weights_compute_what_the_whole_does(rounded, tmp_path: Path, budget: str) -> None:
    runtime = PortableOnnx(packed_on_disk=True, shards=3, resident=budget)
    engine = build_engine(runtime, rounded, tmp_path / "engine")
    whole, cut = (one.open(engine, threads=1) for one in (replace(runtime, resident=None), runtime))
    assert np.array_equal(cut.logits(PROMPT), whole.logits(PROMPT))
    cut.close()


def test_a_shard_counts_the_bytes_that_its_kernels_read(rounded, tmp_path: Path) -> None:
    sizes = {
        saved: sum(
            shard.size_bytes
            for shard in shards.read(
                build_engine(PortableOnnx(shards=3, packed_on_disk=saved), rounded, tmp_path / str(saved)).directory
            )
        )
        for saved in (True, False)
    }
    codes_and_scales = sum(rounded.spec.size_bytes(name) for name in rounded.spec.schemes)
    assert codes_and_scales < sizes[True] < 3 * codes_and_scales
    assert sizes[True] != sizes[False]


@pytest.fixture(scope="module")
def matrices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph of products with 4 MiB of weights each."""
    folder = tmp_path_factory.mktemp("matrices")
    chance = np.random.default_rng(0)
    weights = [numpy_helper.from_array(chance.random((SIDE, SIDE), np.float32), f"w{n}") for n in range(COUNT)]
    nodes = [helper.make_node("MatMul", [f"x{n}", f"w{n}"], [f"x{n + 1}"]) for n in range(COUNT)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, SIDE]) for name in ("x0", f"x{COUNT}")]
    model = helper.make_model(helper.make_graph(nodes, "products", ends[:1], ends[1:], weights), ir_version=10)
    model.opset_import[0].version = 20
    onnx.save(model, folder / graph.GRAPH_FILE, save_as_external_data=True, location=graph.WEIGHTS_FILE)
    return folder


OPENED = """
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
settled = read_memory()
if len(sys.argv) > 2:
    collapse_huge_pages().join()
after = read_memory()
session.run(None, {"x0": np.ones((1, session.get_inputs()[0].shape[1]), np.float32)})
for name in ("rss_bytes", "huge_bytes"):
    print(*((one[name] - before[name]) / 2**20 for one in (opened, settled, after, read_memory())))
"""


def opened(folder: Path, *joined: str) -> tuple[list[float], list[float]]:
    """MiB that a process has of a graph, and of it in huge pages: opened, settled, perhaps joined, and when it ran."""
    command = [sys.executable, "-c", OPENED, str(folder / graph.GRAPH_FILE), *joined]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    resident, huge = (list(map(float, line.split())) for line in told)
    return resident, huge


def test_what_was_read_to_open_an_engine_is_given_back_and_only_packed_weights_come_again(
    matrices: Path, tmp_path: Path
) -> None:
    for file in matrices.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    prepacked_weights.save(tmp_path / graph.GRAPH_FILE)
    weights_mib = COUNT * 4 * SIDE**2 / MIB
    (_, settled, _, ran), _ = opened(tmp_path)
    assert settled < 0.3 * weights_mib  # all of it is mapped from the file
    assert 0.9 * weights_mib < ran < 1.5 * weights_mib  # the packed ones, not those beside them
    (_, copied, _, _), _ = opened(matrices)
    assert copied > 0.9 * weights_mib  # each process has its own


def joins() -> bool:
    try:
        mapped_memory.collapse_huge_pages().join()
    except BuildError:
        return False
    return True


def test_copies_of_weights_are_joined_to_huge_pages_and_take_no_more_memory(matrices: Path) -> None:
    if not joins():
        pytest.skip("this kernel joins no pages (before Linux 6.1)")
    (_, settled, joined, _), (_, _, huge, _) = opened(matrices, "joined")
    assert huge > 0.5 * settled
    assert joined < 1.1 * settled


def test_a_kernel_that_cannot_join_pages_is_named_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_memory, "MADV_COLLAPSE", 0x7FFF)  # advice that no kernel knows
    with pytest.raises(BuildError, match=r"runtime\.huge_pages: this kernel cannot collapse pages.*Use false"):
        mapped_memory.collapse_huge_pages()


@pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES.keys())
@pytest.mark.parametrize("knob", ["packed_on_disk", "huge_pages"])
def test_a_knob_of_packed_weights_is_refused_where_there_are_none(runtime, knob: str) -> None:
    with pytest.raises(ConfigError, match=f"`{knob}` needs prepacked weights.*Use false, or prepacked=true"):
        replace(runtime, prepacked=False, **{knob: True})


@pytest.mark.parametrize("knob", [{"packed_on_disk": True}, {"huge_pages": True}])
def test_knobs_of_memory_are_refused_where_weights_lie_on_a_gpu(knob) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(knob))}: .* requires provider=cpu, got cuda"):
        PortableOnnx(provider="cuda", **knob)


@pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES.keys())
def test_weights_in_fp16_are_not_packed_on_disk_as_fp32(runtime, checkpoint) -> None:
    with pytest.raises(ConfigError, match=r"runtime\.packed_on_disk: `packed_on_disk` must be false for fp16 weights"):
        replace(runtime, packed_on_disk=True).check(replace(checkpoint.spec, weight_dtype="fp16"))


def test_what_a_model_is_compared_with_is_not_packed_on_disk() -> None:
    assert Genai(packed_on_disk=True, huge_pages=True).baseline == Genai(huge_pages=True)
    for runtime in (Genai(), PortableOnnx()):
        assert replace(runtime, packed_on_disk=True, mapped_weights="locked", prompt_lookup=2).baseline == runtime


def test_a_graph_that_cannot_be_packed_says_so(tmp_path: Path) -> None:
    (tmp_path / graph.GRAPH_FILE).write_bytes(b"no graph")
    with pytest.raises(BuildError, match=r"cannot pack the weights of model\.onnx"):
        prepacked_weights.save(tmp_path / graph.GRAPH_FILE)
    assert [file.name for file in tmp_path.iterdir()] == [graph.GRAPH_FILE]


HELD = """
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


def held(folder: Path, how: str) -> tuple[float, float]:
    """MiB of files that a process has in memory, and that it has locked there, once a graph is open."""
    command = [sys.executable, "-c", HELD, str(folder / graph.GRAPH_FILE), how]
    resident, locked = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(resident), float(locked)


def test_mapped_weights_come_on_demand_or_at_once_and_may_be_locked(matrices: Path) -> None:
    weights_mib = COUNT * 4 * SIDE**2 / MIB
    on_demand, prefaulted, locked = (held(matrices, how) for how in ("on_demand", "prefaulted", "locked"))
    assert prefaulted[0] - on_demand[0] > 0.9 * weights_mib
    assert prefaulted[1] == 0
    assert locked[1] > 0.99 * weights_mib


def test_weights_that_cannot_be_held_are_named_with_the_mend() -> None:
    for how, hint in {"prefaulted": "Linux 5.14", "locked": "ulimit -l"}.items():
        with pytest.raises(BuildError, match=rf"runtime\.mapped_weights: the weights cannot be {how}.*{hint}"):
            mapped_memory.make_resident([(mmap.PAGESIZE, mmap.PAGESIZE)], how)  # nothing is mapped there


@pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES.keys())
def test_copied_weights_are_not_held_as_mapped_ones(runtime) -> None:
    with pytest.raises(ConfigError, match="`mapped_weights` must be on_demand with prepacked=true"):
        replace(runtime, mapped_weights="locked")


@pytest.mark.parametrize("how", ["prefaulted", "locked"])
def test_an_engine_whose_weights_are_held_generates_the_same(pair, how: str) -> None:
    runtime, saved, _ = pair
    told, expected = (
        list(one.open(saved, threads=1).generate(PROMPT[:40], 8, stop_at_end=False))
        for one in (replace(runtime, mapped_weights=how), runtime)
    )
    assert told == expected


def test_of_shards_those_that_stay_are_held(rounded, tmp_path: Path) -> None:
    runtime = PortableOnnx(packed_on_disk=True, shards=3, resident="1 GiB", mapped_weights="locked")
    engine = build_engine(runtime, rounded, tmp_path / "engine")
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
