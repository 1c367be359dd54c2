"""Test that shards compute the same as the whole graph, and that memory stays within its budgets."""

from __future__ import annotations

import mmap
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnxruntime import OrtValue
from support.stages import apply_step, build_engine

from edgeopt.compress.quantization.quantize import Quantize
from edgeopt.core.artifact import Checkpoint, Engine
from edgeopt.core.target import Device, Target
from edgeopt.errors import BuildError, ConfigError
from edgeopt.runtimes.onnx import graph, shards
from edgeopt.runtimes.onnx.kv_cache_offload import KvOffload, select_resident
from edgeopt.runtimes.onnx.predict import streamed_bytes
from edgeopt.runtimes.onnx.runtime import PortableOnnx
from edgeopt.runtimes.onnx.shards import Shard
from edgeopt.runtimes.onnx.weight_streaming import WeightStream
from runtimes.test_families import PROMPT

MIB, PAGE_BYTES = 2**20, 4096
DELETED = " (deleted)"
"""Suffix in /proc/self/smaps of a mapped file that has been deleted."""
SHARDS = 3


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return build_engine(PortableOnnx(shards=SHARDS), checkpoint, tmp_path_factory.mktemp("sharded") / "engine")


@pytest.mark.parametrize("budget", ["0 B", "100 kB", "1 GiB"])
@pytest.mark.parametrize("read_ahead", [True, False], ids=["read ahead", "on demand"])
def test_shards_match_whole_graph(engine: Engine, budget: str, read_ahead: bool) -> None:
    whole = PortableOnnx().open(engine, threads=1)
    runtime = PortableOnnx(shards=SHARDS, resident=budget, prepacked=False, read_ahead=read_ahead)
    sharded = runtime.open(engine, threads=1)
    assert np.abs(whole.logits(PROMPT) - sharded.logits(PROMPT)).max() < 1e-4
    tokens, expected = (list(session.generate(PROMPT[:40], 8, stop_at_end=False)) for session in (sharded, whole))
    assert tokens == expected
    sharded.close()


def test_cuts_at_cache_outputs_preserve_logits(engine: Engine, tmp_path: Path) -> None:
    shutil.copytree(engine.directory, tmp_path / "many", ignore=shutil.ignore_patterns("shard*"))
    many_shards = replace(engine, directory=tmp_path / "many")
    model = onnx.load(many_shards.directory / graph.GRAPH_FILE, load_external_data=False)
    producers = {name: index for index, node in enumerate(model.graph.node) for name in node.output}
    cuts = [producers[value.name] + 1 for value in model.graph.output if value.name.startswith(graph.PRESENT_PREFIX)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shards, "_choose_cuts", lambda *_: sorted(set(cuts)))
        shards.split(many_shards.directory, 99)
    assert any(
        value.name.startswith(graph.PRESENT_PREFIX)
        for shard in shards.read(many_shards.directory)
        for value in onnx.load(shard.graph).graph.input
    )
    whole = PortableOnnx().open(engine, threads=1)
    sharded = PortableOnnx(shards=99, resident="0 B", prepacked=False).open(many_shards, threads=1)
    tokens, expected = (list(session.generate(PROMPT[:40], 8, stop_at_end=False)) for session in (sharded, whole))
    assert tokens == expected
    assert np.abs(whole.logits(PROMPT) - sharded.logits(PROMPT)).max() < 1e-4
    sharded.close()


def test_shards_share_weights_file_evenly(engine: Engine) -> None:
    all_shards = shards.read(engine.directory)
    assert [shard.graph.name for shard in all_shards] == ["shard-00.onnx", "shard-01.onnx", "shard-02.onnx"]
    sizes = [shard.size_bytes for shard in all_shards]
    assert max(sizes) < 2 * min(sizes)
    extents = {extent for shard in all_shards for extent in shard.weights}
    assert max(offset + length for offset, length in extents) <= (engine.directory / graph.WEIGHTS_FILE).stat().st_size
    for shard in all_shards:
        onnx.checker.check_model(shard.graph)
        assert shard.graph.stat().st_size < 200_000


def test_engine_without_shards_is_rejected(engine: Engine, tmp_path: Path) -> None:
    shutil.copytree(engine.directory, tmp_path / "whole", ignore=shutil.ignore_patterns("shard*"))
    with pytest.raises(BuildError, match=r"built without shards. Build it with runtime\.shards=8"):
        PortableOnnx(shards=2, resident="1 MiB", prepacked=False).open(
            replace(engine, directory=tmp_path / "whole"), threads=1
        )


def test_single_matrix_cannot_be_split(tmp_path: Path) -> None:
    weights = helper.make_tensor("w", TensorProto.FLOAT, [64, 64], np.ones(64 * 64, np.float32).tobytes(), raw=True)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 64]) for name in "xy"]
    matmul = helper.make_node("MatMul", ["x", "w"], ["y"])
    single = helper.make_graph([matmul], "g", values[:1], values[1:], [weights])
    onnx.save(helper.make_model(single), tmp_path / graph.GRAPH_FILE)
    with pytest.raises(BuildError, match="cannot be split into shards"):
        shards.split(tmp_path, 2)


@pytest.mark.parametrize(
    ("budget", "resident"), [(0, set()), (5, {0}), (9, {0, 1}), (8, {0, 2}), (100, {0, 1, 2})], ids=str
)
def test_first_fitting_shards_stay_resident(budget: int, resident: set[int]) -> None:
    assert select_resident([5, 4, 3], budget) == resident


def test_recent_tokens_stay_in_memory() -> None:
    before = resident_bytes(DELETED)
    arrays = KvOffload([{"past.key", "past.key.recent"}], 0).allocate(
        dict.fromkeys(("past.key", "past.key.recent"), ((1, 1, MIB // 4, 1), np.float32))
    )
    for array in arrays.values():
        array[:] = 1
    assert resident_bytes(DELETED) - before == MIB


@pytest.mark.parametrize("budget", ["0 B", "100 kB"])
def test_offloaded_cache_is_exact(engine: Engine, budget: str) -> None:
    offloaded = PortableOnnx(shards=SHARDS, kv_resident=budget).open(engine, threads=1)
    in_memory = PortableOnnx(shards=SHARDS, kv_resident="1 GiB").open(engine, threads=1)
    assert (offloaded.logits(PROMPT) == in_memory.logits(PROMPT)).all()
    first, first_expected = (session.generate(PROMPT[:40], 8, stop_at_end=False) for session in (offloaded, in_memory))
    second, second_expected = (  # interleaved with the first sequence; each has its own cache
        session.generate(PROMPT[7:30], 8, stop_at_end=False) for session in (offloaded, in_memory)
    )
    assert list(zip(first, second, strict=True)) == list(zip(first_expected, second_expected, strict=True))
    offloaded.close()


def test_offloaded_buffers_are_released_without_loss() -> None:
    offload = KvOffload([{"x", "past.0"}, {"past.1", "past.2"}, {"past.3"}], 3 * MIB)
    before = resident_bytes(DELETED)
    arrays = offload.allocate({f"past.{n}": ((1, 1, MIB // 4, 1), np.float32) for n in range(4)})
    values = {name: OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    for number, value in enumerate(values.values()):
        value.update_inplace(np.full((1, 1, MIB // 4, 1), number, np.float32))
    assert resident_bytes(DELETED) - before == MIB  # the third shard; the first two fit the budget
    for shard in (0, 1, 2):
        offload.prefetch_after(shard, values)
        offload.release(shard, values)
    assert resident_bytes(DELETED) == before
    assert [float(value.numpy().max()) for value in values.values()] == list(map(float, range(4)))
    assert resident_bytes(DELETED) - before == MIB
    del values, value, arrays
    assert resident_bytes(DELETED) == before


def test_full_disk_is_reported_before_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", raise_no_space)
    with pytest.raises(BuildError, match=r"no space for 4096 bytes of keys and values.*TMPDIR"):
        KvOffload([{"past.0"}], 0).allocate({"past.0": ((1, 1, 1024, 1), np.float32)})


def resident_bytes(file: Path | str) -> int:
    """Return the resident bytes of this process's mappings whose path ends with `file`."""
    total, matches = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            matches = line.endswith(str(file))
        elif matches and first == "Rss:":
            total += 1024 * int(line.split()[1])
    return total


@pytest.mark.parametrize("read_ahead", [True, False], ids=["read ahead", "on demand"])
def test_only_streamed_shards_are_released(tmp_path: Path, read_ahead: bool) -> None:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(MIB) * 6)
    all_shards = [Shard(graph=Path("g"), weights=[(2 * MIB * number, 2 * MIB)]) for number in range(3)]
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        weights = WeightStream(path, all_shards, {1, 2}, read_ahead=read_ahead)
        resident = []
        for shard in (0, 1, 2, 0, 1, 2):
            weights.prefetch_after(shard)
            sum(mapped[index] for index in range(2 * MIB * shard, 2 * MIB * (shard + 1), PAGE_BYTES))
            weights.release(shard)
            resident.append(resident_bytes(path))
        weights.close()
    assert resident == [2 * MIB] * 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shards": 0}, "shards: `shards` must be between 1 and 99, got 0"),
        ({"shards": 100}, "shards: `shards` must be between 1 and 99, got 100"),
        ({"resident": "512"}, "resident: .*must have a unit"),
        (
            {"resident": "1 GiB", "prepacked": False},
            "resident: .* requires several shards.*Use shards=8",
        ),
        ({"kv_resident": "1 GiB"}, "kv_resident: .* requires several shards.*Use shards=8"),
        (
            {"kv_resident": "1 GiB", "shards": 8, "provider": "cuda"},
            "kv_resident: .* requires provider=cpu",
        ),
        ({"kv_window": 31}, r"kv_window: `kv_window` must be at least `prompt_tokens` \(32\), got 31.*Use 32 or more"),
        ({"kv_window": 64, "prompt_tokens": 65}, r"kv_window: .* \(65\), got 64.*Use 65 or more, or fewer"),
        ({"kv_window": 64, "provider": "cuda"}, "kv_window: .* requires provider=cpu"),
        ({"resident": "1 GiB", "shards": 8}, "prepacked: `prepacked` must be false.*Use prepacked=false"),
        (
            {"resident": "1 GiB", "shards": 8, "prepacked": False, "provider": "cuda"},
            "resident: .* requires provider=cpu",
        ),
    ],
    ids=str,
)
def test_ineffective_option_is_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PortableOnnx(**options)


@pytest.mark.parametrize("packed", [True, False], ids=["4 bits, packed on disk", "fp32"])
@pytest.mark.parametrize(("budget", "resident_shards"), [("0 B", 0), ("1 GiB", SHARDS)])
def test_streamed_bytes_match_built_shards(
    checkpoint: Checkpoint, tmp_path: Path, packed: bool, budget: str, resident_shards: int
) -> None:
    runtime = PortableOnnx(shards=SHARDS, resident=budget, prepacked=packed, packed_on_disk=packed)
    if packed:
        checkpoint = apply_step(Quantize(weights="int4", symmetric=True), checkpoint, tmp_path / "quantized")
    sizes = [
        shard.size_bytes for shard in shards.read(build_engine(runtime, checkpoint, tmp_path / "engine").directory)
    ]
    streamed = streamed_bytes(checkpoint.spec, runtime)
    assert streamed == pytest.approx(sum(sizes[resident_shards:]), rel=0.15)  # small tensors are padded


def test_predicted_decode_latency_equals_storage_time(checkpoint: Checkpoint) -> None:
    device = Device(name="board", cpu="", cores=2, ram_bytes=2**30, storage_gb_per_s=0.1)
    runtime = PortableOnnx(shards=SHARDS, resident="0 B", prepacked=False)
    _, latency = runtime.predict(checkpoint.spec, Target(name="board", device=device), copied_bytes=0)
    assert (latency.metric, latency.unit, latency.kind) == ("latency/decode_p50_ms", "ms", "predicted")
    assert latency.value == pytest.approx(1e3 * streamed_bytes(checkpoint.spec, runtime) / 0.1e9)
    assert latency.low < latency.value < latency.high


@pytest.mark.parametrize(
    ("runtime", "storage_gb_per_s"),
    [
        (PortableOnnx(shards=SHARDS), 1.0),
        (PortableOnnx(shards=SHARDS, resident="1 GiB", prepacked=False), 1.0),
        (PortableOnnx(shards=SHARDS, resident="260 kB", prepacked=False), 1.0),
        (PortableOnnx(shards=SHARDS, resident="0 B", prepacked=False), 0.0),
        (PortableOnnx(shards=SHARDS, resident="0 B", prepacked=False, processes=2), 1.0),
    ],
    ids=["no budget", "everything fits", "one streamed shard", "unknown storage", "several processes"],
)
def test_latency_is_predicted_only_if_storage_bound(
    checkpoint: Checkpoint, runtime: PortableOnnx, storage_gb_per_s: float
) -> None:
    device = Device(name="board", cpu="", cores=2, ram_bytes=2**30, storage_gb_per_s=storage_gb_per_s)
    (prediction,) = runtime.predict(checkpoint.spec, Target(name="board", device=device), copied_bytes=0)
    assert prediction.metric == "size/engine_mib"
