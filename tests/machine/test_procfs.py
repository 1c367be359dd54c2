from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeopt.machine import procfs
from edgeopt.machine.procfs import CpuClock, foreign_cpu_share

TICK = procfs.TICK_S


def write(root: Path, path: str, content: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(content)


def test_memory_counts_resident_pages():
    # in a fresh process, where nothing else allocates or frees memory
    code = (
        "import json; from edgeopt.machine import procfs; before = procfs.read_memory(); "
        f"ballast = b'1' * {64 * 2**20}; print(json.dumps([before, procfs.read_memory()]))"
    )
    before, after = json.loads(subprocess.check_output([sys.executable, "-c", code]))
    for name in ("rss_bytes", "private_bytes", "pss_bytes"):
        assert after[name] - before[name] == pytest.approx(64 * 2**20, rel=0.05), name
    assert after["peak_rss_bytes"] > after["rss_bytes"] - 2**20, "Linux updates the peak lazily"


def test_busy_time_excludes_idle_and_guest_ticks(tmp_path):
    # user nice system idle iowait irq softirq steal guest guest_nice
    write(tmp_path, "proc/stat", "cpu 9 9 9 9 9 9 9 9 9 9\ncpu1 1 2 3 1000 1000 4 5 6 1000 1000\nintr 5\n")
    assert procfs.read_busy_s(tmp_path) == {1: pytest.approx(21 * TICK)}


def clock(time_s: float, own_s: float, *busy: float) -> CpuClock:
    return CpuClock(time_s=time_s, own_s=own_s, busy_s=dict(enumerate(busy)))


def test_own_cpu_time_is_not_foreign():
    assert foreign_cpu_share(clock(0, 0, 5, 5), clock(10, 12, 12, 10), cores=[0, 1]) == 0


def test_foreign_share_is_relative_to_all_cores():
    share = foreign_cpu_share(clock(0, 0, 0, 0), clock(10, 10, 10, 5), cores=[0, 1])
    assert share == pytest.approx((5 - 2 * TICK) / 20)


def test_foreign_load_on_pinned_core_counts_fully():
    start, end = clock(0, 0, *[0] * 64), clock(10, 5, 10, *[0] * 63)
    assert foreign_cpu_share(start, end, cores=[0]) == pytest.approx((5 - TICK) / 10)


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0, 100), st.floats(0, 100))
def test_foreign_share_is_between_zero_and_one(elapsed, own, core0, core1):
    assert 0 <= foreign_cpu_share(clock(0, 0, 0, 0), clock(elapsed, own, core0, core1), cores=[1]) <= 1


def test_device_state_without_sensors_is_empty(tmp_path):
    assert procfs.read_device_state(tmp_path) == {}


def test_device_state_reports_hottest_zone_and_mean_frequency(tmp_path):
    write(tmp_path, "sys/class/thermal/thermal_zone0/temp", "41000\n")
    write(tmp_path, "sys/class/thermal/thermal_zone1/temp", "67500\n")
    write(tmp_path, "sys/class/thermal/thermal_zone2/temp", "suspended\n")
    for core, khz in enumerate((1_500_000, 2_500_000)):
        write(tmp_path, f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq", f"{khz}\n")
    assert procfs.read_device_state(tmp_path) == {"temperature_c": 67.5, "frequency_mhz": 2000}


def test_pinned_cores_prefer_distinct_physical_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    for core, siblings in enumerate(("0-1", "0-1", "2-3", "2-3")):
        write(tmp_path, f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list", siblings)
    assert procfs.pinned_cores(2, tmp_path) == [0, 2]
    assert procfs.pinned_cores(0, tmp_path) == [0, 2, 1, 3]
    assert procfs.pinned_cores(9, tmp_path) == [0, 2, 1, 3]
