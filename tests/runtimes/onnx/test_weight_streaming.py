"""A graph cut into shards computes as the whole, and holds no more weights than its budget."""

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
from edgeopt.runtimes.onnx.kv_cache_offload import Spill, select_resident
from edgeopt.runtimes.onnx.predict import streamed_bytes
from edgeopt.runtimes.onnx.runtime import PortableOnnx
from edgeopt.runtimes.onnx.shards import Shard
from edgeopt.runtimes.onnx.weight_streaming import Weights
from runtimes.test_families import PROMPT

MIB, PAGE = 2**20, 4096
UNNAMED = " (deleted)"
"""What ends the name of a mapped file that has none any more."""
SHARDS = 3


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return build_engine(PortableOnnx(shards=SHARDS), checkpoint, tmp_path_factory.mktemp("cut") / "engine")


@pytest.mark.parametrize("budget", ["0 B", "100 kB", "1 GiB"])
@pytest.mark.parametrize("ahead", [True, False], ids=["read ahead", "on demand"])
def test_shards_compute_and_generate_what_the_whole_does(engine: Engine, budget: str, ahead: bool) -> None:
    whole = PortableOnnx().open(engine, threads=1)
    cut = PortableOnnx(shards=SHARDS, resident=budget, prepacked=False, read_ahead=ahead).open(engine, threads=1)
    assert np.abs(whole.logits(PROMPT) - cut.logits(PROMPT)).max() < 1e-4
    told, expected = (list(one.generate(PROMPT[:40], 8, stop_at_end=False)) for one in (cut, whole))
    assert told == expected
    cut.close()


def test_cuts_between_a_cache_and_what_reads_it_change_nothing(engine: Engine, tmp_path: Path) -> None:
    shutil.copytree(engine.directory, tmp_path / "finely", ignore=shutil.ignore_patterns("shard*"))
    finely = replace(engine, directory=tmp_path / "finely")
    model = onnx.load(finely.directory / graph.GRAPH_FILE, load_external_data=False)
    places = {name: index for index, node in enumerate(model.graph.node) for name in node.output}
    cuts = [places[value.name] + 1 for value in model.graph.output if value.name.startswith(graph.PRESENT_PREFIX)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shards, "_bounds", lambda *_: sorted(set(cuts)))
        shards.split(finely.directory, 99)
    assert any(
        value.name.startswith(graph.PRESENT_PREFIX)
        for shard in shards.read(finely.directory)
        for value in onnx.load(shard.graph).graph.input
    )
    whole = PortableOnnx().open(engine, threads=1)
    cut = PortableOnnx(shards=99, resident="0 B", prepacked=False).open(finely, threads=1)
    told, expected = (list(one.generate(PROMPT[:40], 8, stop_at_end=False)) for one in (cut, whole))
    assert told == expected
    assert np.abs(whole.logits(PROMPT) - cut.logits(PROMPT)).max() < 1e-4
    cut.close()


def test_shards_share_one_file_of_weights_and_hold_about_equally_many_bytes(engine: Engine) -> None:
    found = shards.read(engine.directory)
    assert [shard.graph.name for shard in found] == ["shard-00.onnx", "shard-01.onnx", "shard-02.onnx"]
    sizes = [shard.size_bytes for shard in found]
    assert max(sizes) < 2 * min(sizes)
    whole = {index for shard in found for index in shard.weights}
    assert max(offset + length for offset, length in whole) <= (engine.directory / graph.WEIGHTS_FILE).stat().st_size
    for shard in found:
        onnx.checker.check_model(shard.graph)
        assert shard.graph.stat().st_size < 200_000


def test_an_engine_that_was_not_cut_is_refused_with_the_mend(engine: Engine, tmp_path: Path) -> None:
    shutil.copytree(engine.directory, tmp_path / "whole", ignore=shutil.ignore_patterns("shard*"))
    with pytest.raises(BuildError, match=r"not cut into shards. Build it with runtime\.shards=8"):
        PortableOnnx(shards=2, resident="1 MiB", prepacked=False).open(
            replace(engine, directory=tmp_path / "whole"), threads=1
        )


def test_one_matrix_cannot_be_cut(tmp_path: Path) -> None:
    weights = helper.make_tensor("w", TensorProto.FLOAT, [64, 64], np.ones(64 * 64, np.float32).tobytes(), raw=True)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 64]) for name in "xy"]
    made = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", values[:1], values[1:], [weights])
    onnx.save(helper.make_model(made), tmp_path / graph.GRAPH_FILE)
    with pytest.raises(BuildError, match="no place to cut it at"):
        shards.split(tmp_path, 2)


@pytest.mark.parametrize(
    ("budget", "stay"), [(0, set()), (5, {0}), (9, {0, 1}), (8, {0, 2}), (100, {0, 1, 2})], ids=str
)
def test_the_first_shards_that_fit_together_stay(budget: int, stay: set[int]) -> None:
    assert select_resident([5, 4, 3], budget) == stay


def test_the_last_tokens_that_stand_beside_codes_stay_in_memory() -> None:
    before = resident_bytes(UNNAMED)
    arrays = Spill([{"past.key", "past.key.recent"}], 0).allocate(
        dict.fromkeys(("past.key", "past.key.recent"), ((1, 1, MIB // 4, 1), np.float32))
    )
    for array in arrays.values():
        array[:] = 1
    assert resident_bytes(UNNAMED) - before == MIB


@pytest.mark.parametrize("budget", ["0 B", "100 kB"])
def test_keys_and_values_in_a_file_are_as_exact_as_in_memory(engine: Engine, budget: str) -> None:
    tiered = PortableOnnx(shards=SHARDS, kv_resident=budget).open(engine, threads=1)
    untiered = PortableOnnx(shards=SHARDS, kv_resident="1 GiB").open(engine, threads=1)
    assert (tiered.logits(PROMPT) == untiered.logits(PROMPT)).all()
    told, expected = (one.generate(PROMPT[:40], 8, stop_at_end=False) for one in (tiered, untiered))
    other = tiered.generate(PROMPT[7:30], 8, stop_at_end=False)  # two sequences in turn, each with keys of its own
    assert [(a, b) for a, b in zip(told, other, strict=True)] == list(
        zip(expected, untiered.generate(PROMPT[7:30], 8, stop_at_end=False), strict=True)
    )
    tiered.close()


def test_what_a_shard_read_of_keys_is_given_back_and_stays_as_it_was() -> None:
    spill = Spill([{"x", "past.0"}, {"past.1", "past.2"}, {"past.3"}], 3 * MIB)
    before = resident_bytes(UNNAMED)
    arrays = spill.allocate({f"past.{n}": ((1, 1, MIB // 4, 1), np.float32) for n in range(4)})
    held = {name: OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    for number, value in enumerate(held.values()):
        value.update_inplace(np.full((1, 1, MIB // 4, 1), number, np.float32))
    assert resident_bytes(UNNAMED) - before == MIB  # of the third shard: the first two fit the budget
    for number in (0, 1, 2):
        spill.before(number, held)
        spill.after(number, held)
    assert resident_bytes(UNNAMED) == before
    assert [float(value.numpy().max()) for value in held.values()] == list(map(float, range(4)))
    assert resident_bytes(UNNAMED) - before == MIB
    del held, value, arrays
    assert resident_bytes(UNNAMED) == before


def test_a_full_disk_is_told_before_a_token_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(BuildError, match=r"no room for 4096 bytes of keys and values.*TMPDIR"):
        Spill([{"past.0"}], 0).allocate({"past.0": ((1, 1, 1024, 1), np.float32)})


def resident_bytes(file: Path | str) -> int:
    """Of this process's mappings of a file, or of those whose name ends so."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            inside = line.endswith(str(file))
        elif inside and first == "Rss:":
            total += 1024 * int(line.split()[1])
    return total


@pytest.mark.parametrize("ahead", [True, False], ids=["read ahead", "on demand"])
def test_what_a_streamed_shard_read_is_given_back_and_what_is_resident_stays(tmp_path: Path, ahead: bool) -> None:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(MIB) * 6)
    found = [Shard(graph=Path("g"), weights=[(2 * MIB * number, 2 * MIB)]) for number in range(3)]
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        weights = Weights(path, found, {1, 2}, ahead=ahead)
        kept = []
        for number in (0, 1, 2, 0, 1, 2):
            weights.before(number)
            sum(mapped[index] for index in range(2 * MIB * number, 2 * MIB * (number + 1), PAGE))
            weights.after(number)
            kept.append(resident_bytes(path))
        weights.close()
    assert kept == [2 * MIB] * 6


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"shards": 0}, "shards: 0 is not in 1"),
        ({"shards": 100}, "shards: 100 is not in"),
        ({"resident": "512"}, "resident: .*has no unit"),
        ({"resident": "1 GiB", "prepacked": False}, "resident: .*Give shards=8"),
        ({"kv_resident": "1 GiB"}, "kv_resident: .*Give shards=8"),
        ({"kv_resident": "1 GiB", "shards": 8, "provider": "cuda"}, "kv_resident: cuda has memory"),
        ({"kv_window": 31}, "kv_window: 31 tokens are fewer than the 32 .*Give 32 or more"),
        ({"kv_window": 64, "prompt_tokens": 65}, "kv_window: 64 .* the 65 .*Give 65 or more, or fewer prompt_tokens"),
        ({"kv_window": 64, "provider": "cuda"}, "kv_window: cuda has memory"),
        ({"resident": "1 GiB", "shards": 8}, "prepacked: .*Give prepacked=false"),
        ({"resident": "1 GiB", "shards": 8, "prepacked": False, "provider": "cuda"}, "resident: cuda has memory"),
    ],
    ids=str,
)
def test_knobs_that_would_be_ignored_are_refused_with_the_mend(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        PortableOnnx(**values)


@pytest.mark.parametrize("saved", [True, False], ids=["4 bits, packed on disk", "fp32"])
@pytest.mark.parametrize(("budget", "stay"), [("0 B", 0), ("1 GiB", SHARDS)])
def test_what_a_token_reads_from_storage_is_known_beforehand(
    checkpoint: Checkpoint, tmp_path: Path, saved: bool, budget: str, stay: int
) -> None:
    runtime = PortableOnnx(shards=SHARDS, resident=budget, prepacked=saved, packed_on_disk=saved)
    if saved:
        checkpoint = apply_step(Quantize(weights="int4", symmetric=True), checkpoint, tmp_path / "rounded")
    sizes = [
        shard.size_bytes for shard in shards.read(build_engine(runtime, checkpoint, tmp_path / "engine").directory)
    ]
    assert streamed_bytes(checkpoint.spec, runtime) == pytest.approx(
        sum(sizes[stay:]), rel=0.15
    )  # small ones are padded


def test_a_token_takes_as_long_as_storage_takes_for_what_it_reads(checkpoint: Checkpoint) -> None:
    device = Device(name="board", cpu="", cores=2, ram_bytes=2**30, storage_gb_per_s=0.1)
    runtime = PortableOnnx(shards=SHARDS, resident="0 B", prepacked=False)
    _, told = runtime.predict(checkpoint.spec, Target(name="board", device=device), carried_bytes=0)
    assert (told.metric, told.unit, told.kind) == ("latency/decode_p50_ms", "ms", "predicted")
    assert told.value == pytest.approx(1e3 * streamed_bytes(checkpoint.spec, runtime) / 0.1e9)
    assert told.low < told.value < told.high


@pytest.mark.parametrize(
    ("runtime", "rate"),
    [
        (PortableOnnx(shards=SHARDS), 1.0),
        (PortableOnnx(shards=SHARDS, resident="1 GiB", prepacked=False), 1.0),
        (PortableOnnx(shards=SHARDS, resident="260 kB", prepacked=False), 1.0),
        (PortableOnnx(shards=SHARDS, resident="0 B", prepacked=False), 0.0),
        (PortableOnnx(shards=SHARDS, resident="0 B", prepacked=False, processes=2), 1.0),
    ],
    ids=["all in memory", "all fits", "one shard is left, which stays", "storage not measured", "several processes"],
)
def test_no_time_is_predicted_where_storage_does_not_bound_a_token(
    checkpoint: Checkpoint, runtime: PortableOnnx, rate: float
) -> None:
    device = Device(name="board", cpu="", cores=2, ram_bytes=2**30, storage_gb_per_s=rate)
    (told,) = runtime.predict(checkpoint.spec, Target(name="board", device=device), carried_bytes=0)
    assert told.metric == "size/engine_mib"
