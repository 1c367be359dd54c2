"""Check that the kernel enforces memory caps, and that measurements state a cap that is not enforced."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support import toy_bench

from edgeopt.core.target import Target
from edgeopt.errors import ConfigError, MeasureError
from edgeopt.machine import memory_cap, procfs
from edgeopt.machine.memory_cap import CapUnavailableError, drop_page_cache, enforce_cap
from edgeopt.measure.harness.fake_runtime import FakeRuntime

MIB = 2**20
READ_TWICE = """
import mmap, sys
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
    print(sum(mapped[i] for _ in range(2) for i in range(0, len(mapped), 4096)))
"""


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


@pytest.fixture
def capped():
    """Yield the command prefix for a cap of 64 MiB."""
    try:
        with enforce_cap(64 * MIB) as prefix:
            yield prefix
    except CapUnavailableError as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {}, None),
        ("0::/\n", {"memory.max": "max"}, None),
        ("0::/\n", {"memory.max": "1073741824"}, 2**30),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "4096", "memory.max": "8192"}, 4096),
        ("4:memory:/\n0::/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("4:cpu,memory:/c\n0::/\n", {"memory/c/memory.limit_in_bytes": "4096", "unified/memory.max": "1"}, 4096),
        ("0::/elsewhere\n", {"memory.max": "4096"}, 4096),
    ],
    ids=["none", "uncapped", "container", "nested", "v1 uncapped", "v1 and v2", "of another namespace"],
)
def test_lowest_enclosing_group_cap_applies(tmp_path, groups, files, expected):
    write(tmp_path / "proc/self/cgroup", groups)
    for name, content in files.items():
        write(tmp_path / "sys/fs/cgroup" / name, content)
    assert procfs.read_memory_cap(tmp_path) == expected


def test_capped_process_reads_its_cap(capped):
    code = "from edgeopt.machine import procfs; print(procfs.read_memory_cap())"
    assert int(subprocess.check_output([*capped, sys.executable, "-c", code])) == 64 * MIB


def test_cap_limits_anonymous_memory_not_file_reads(capped, tmp_path):
    (tmp_path / "weights").write_bytes(os.urandom(MIB) * 96)
    drop_page_cache(tmp_path)
    subprocess.run([*capped, sys.executable, "-c", READ_TWICE, str(tmp_path / "weights")], check=True)
    allocating = subprocess.run([*capped, sys.executable, "-c", f"b'1' * {96 * MIB}"], check=False)
    assert allocating.returncode == -9


def test_control_group_is_removed():
    try:
        with enforce_cap(64 * MIB) as prefix:
            group = Path(prefix[-1]).parent
            assert group.is_dir()
    except CapUnavailableError as reason:
        pytest.skip(str(reason))
    assert prefix[-1] == "--" or not group.exists(), "systemd removes its scope"


def install_fake_systemd_run(folder, monkeypatch, body):
    write(folder / "bin" / "systemd-run", f"#!/bin/sh\n{body}\n")
    (folder / "bin" / "systemd-run").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")


def test_systemd_scope_replaces_unavailable_group(tmp_path, monkeypatch):
    install_fake_systemd_run(
        tmp_path, monkeypatch, f'echo "$@" >> {tmp_path}/calls; while [ "$1" != -- ]; do shift; done; shift; "$@"'
    )
    with enforce_cap(64 * MIB, tmp_path) as prefix:
        assert subprocess.check_output([*prefix, "echo", "measured"], text=True) == "measured\n"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert all("--scope" in line and f"-p MemoryMax={64 * MIB} -p MemorySwapMax=0 --" in line for line in calls)
    assert calls[-1].endswith("-- echo measured")


def test_unavailable_cap_reports_both_reasons(tmp_path, monkeypatch):
    install_fake_systemd_run(tmp_path, monkeypatch, "echo Interactive authentication required. >&2; exit 1")
    with pytest.raises(
        CapUnavailableError, match=r"no memory controller .* failed .Interactive authentication required"
    ):
        enforce_cap(64 * MIB, tmp_path).__enter__()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CapUnavailableError, match="systemd-run is not installed"):
        enforce_cap(64 * MIB, tmp_path).__enter__()


def test_generation_is_measured_under_target_cap(capped, tmp_path):
    target = replace(toy_bench.TARGET, memory_cap="128 MiB")
    measurements = toy_bench.build_and_measure(
        tmp_path, FakeRuntime(), toy_bench.make_bench("memory", "latency"), target=target
    )
    assert measurements["memory/cap_mib"].value == 128
    assert "memory cap of 128 MiB enforced by the kernel" in measurements["memory/peak_rss_mib"].method
    assert measurements["latency/decode_p50_ms"].value > 0


def test_engine_exceeding_cap_is_killed(capped, tmp_path):
    target = replace(toy_bench.TARGET, memory_cap="64 MiB")
    with pytest.raises(MeasureError, match=r"killed by SIGKILL under a memory cap of 64 MiB.*memory runs out"):
        toy_bench.build_and_measure(
            tmp_path, FakeRuntime(allocate_mib=96), toy_bench.make_bench("memory"), target=target
        )


def test_unenforced_cap_is_stated_in_memory_methods(tmp_path, monkeypatch):
    def refuse(cap_bytes):
        raise CapUnavailableError("no root")

    monkeypatch.setattr(memory_cap, "enforce_cap", refuse)
    target = replace(toy_bench.TARGET, memory_cap="16 MiB")
    measurements = toy_bench.build_and_measure(tmp_path, FakeRuntime(), toy_bench.make_bench("memory"), target=target)
    assert "memory/cap_mib" not in measurements or measurements["memory/cap_mib"].value > 16
    memory = [measurement for metric, measurement in measurements.items() if metric.startswith("memory/")]
    assert all("memory cap of 16 MiB not enforced" in measurement.method for measurement in memory)


@pytest.mark.parametrize(
    ("cap", "message"), [("512", "must have a unit"), ("-1 MiB", "must not be negative"), ("512 kB", "at least 16 MiB")]
)
def test_invalid_cap_is_refused_with_location(cap, message):
    with pytest.raises(ConfigError, match=f"memory_cap: .*{message}"):
        Target(name="t", memory_cap=cap)
