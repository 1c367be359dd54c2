from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from edgeopt.core.config_objects import instantiate
from edgeopt.core.kernel_times import KernelTimes
from edgeopt.core.target import Target
from edgeopt.machine import inventory
from edgeopt.machine.bandwidth import measure_storage_gb_per_s
from edgeopt.machine.inventory import detect_device, target_yaml


def write(root: Path, path: str, content: str = "") -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(content)


@pytest.fixture
def board(tmp_path):
    """Return the /proc and /sys tree of a single-board computer with an NPU."""
    write(tmp_path, "proc/cpuinfo", "processor\t: 0\nFeatures\t: fp asimd asimddp\n\nprocessor\t: 1\nFeatures\t: fp\n")
    write(tmp_path, "proc/meminfo", "MemTotal:  4194304 kB\nSwapTotal:  102400 kB\nHugePages_Total:       0\n")
    write(tmp_path, "proc/device-tree/model", "Raspberry Pi 5 Model B Rev 1.0\0")
    write(tmp_path, "sys/class/thermal/thermal_zone0/type", "cpu-thermal\n")
    write(tmp_path, "sys/class/thermal/thermal_zone0/temp", "48000\n")
    write(tmp_path, "sys/class/hwmon/hwmon2/name", "ina3221\n")
    write(tmp_path, "sys/class/hwmon/hwmon2/power1_input", "2500000\n")
    write(tmp_path, "dev/hailo0")
    return tmp_path


def test_board_hardware_is_detected(board):
    device = detect_device(measure_rates=False, root=board)
    assert device.cpu == "Raspberry Pi 5 Model B Rev 1.0"
    assert device.isa == ("asimd", "asimddp")
    assert (device.ram_bytes, device.swap_bytes) == (4 * 2**30, 100 * 2**20)
    assert "Hailo NPU (dev/hailo0)" in device.accelerators
    assert device.power_sensors == ("hwmon2 ina3221",)
    assert device.thermal_sensors == ("thermal_zone0 cpu-thermal",)
    assert (device.read_gb_per_s, device.fp32_gflops, device.int8_gops) == (0, 0, 0)


def test_container_limit_caps_ram_bytes(board):
    write(board, "sys/fs/cgroup/memory.max", str(2**30))
    assert inventory.ram_bytes(board) == 2**30
    write(board, "sys/fs/cgroup/memory.max", "max\n")
    assert inventory.ram_bytes(board) == 4 * 2**30


def test_cpu_model_prefers_model_name(board):
    write(board, "proc/cpuinfo", "model name\t: AMD EPYC\nflags\t: fpu avx2 avx512_vnni\n")
    assert inventory.cpu_model(board) == "AMD EPYC"
    assert inventory.instruction_sets(board) == ("avx2", "avx512_vnni")


def test_target_yaml_round_trips():
    device = replace(detect_device(measure_rates=False), accelerators=("NPU × 2",))
    times = ((1.0, 2.0, 3.0, 4.0),) * 5 + ((1.0, 2.5, 5.0, 6.5),)
    kernels = KernelTimes(threads=2, matrix={"int4/32": times}, layer=(7.0, 8.0, 6.0), token=(9.0, 1.0))
    text = target_yaml(Target(name="here", device=device, threads=2, context_length=256, kernels=kernels))
    assert text.startswith("# @package _global_\n")
    target = instantiate(yaml.safe_load(text)["target"])
    assert (target.name, target.threads, target.context_length) == ("here", 2, 256)
    assert target.device == device
    assert target.kernels == kernels


def test_storage_without_direct_io_reads_zero(tmp_path):
    assert measure_storage_gb_per_s(tmp_path / "absent") == 0


def test_rates_of_this_machine_are_positive():
    device = detect_device(measure_rates=True)
    assert device.read_gb_per_s > 0
    assert device.storage_gb_per_s > 0
    assert device.fp32_gflops > 0
    assert device.int8_gops > 0
