"""Detect the hardware of this machine from /proc and /sys, and measure its throughput on request."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

from edgeopt.core.config_objects import to_config
from edgeopt.core.target import Device, Target
from edgeopt.machine import bandwidth
from edgeopt.machine.procfs import ROOT, read_memory_cap, read_text

# extensions that runtimes check to select their matrix kernels
_ISA_EXTENSIONS = (
    "f16c",
    "fma",
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "neon",
    "asimd",
    "asimdhp",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
    "sme",
)
_ACCELERATOR_NODES = {
    "dev/kfd": "AMD GPU (ROCm)",
    "dev/apex_*": "Google Edge TPU",
    "dev/hailo*": "Hailo NPU",
    "dev/rknpu*": "Rockchip NPU",
    "dev/nvhost-gpu": "NVIDIA Tegra GPU",
    "dev/accel/accel*": "NPU",
    "dev/dri/renderD*": "GPU",
}


def detect_device(*, measure_rates: bool, root: Path = ROOT) -> Device:
    """Return the device description of this machine.

    With `measure_rates`, also measure its read bandwidths and matrix throughput, which takes a few seconds.
    """
    return Device(
        name=platform.node() or "this machine",
        cpu=cpu_model(root),
        cores=len(os.sched_getaffinity(0)),
        ram_bytes=ram_bytes(root),
        isa=instruction_sets(root),
        swap_bytes=_read_meminfo(root).get("SwapTotal", 0),
        storage_bytes=shutil.disk_usage(root).total,
        accelerators=accelerators(root),
        power_sensors=power_sensors(root),
        thermal_sensors=thermal_sensors(root),
        read_gb_per_s=round(bandwidth.measure_read_gb_per_s(), 1) if measure_rates else 0.0,
        storage_gb_per_s=round(bandwidth.measure_storage_gb_per_s(Path.cwd()), 3) if measure_rates else 0.0,
        fp32_gflops=round(bandwidth.measure_fp32_gflops(), 1) if measure_rates else 0.0,
        int8_gops=round(bandwidth.measure_int8_gops(), 1) if measure_rates else 0.0,
    )


def target_yaml(target: Target) -> str:
    """Return the content of a conf/target YAML file for `target`."""
    import yaml

    document = {"target": to_config(target)}
    return "# @package _global_\n" + yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)


def cpu_model(root: Path = ROOT) -> str:
    """Return the name of the processor; without one that of the board, and without a board the architecture."""
    info = _read_cpuinfo(root)
    board = root / "proc/device-tree/model"
    if "model name" in info:
        return info["model name"]
    if board.is_file():
        return board.read_text(errors="replace").strip("\0 \n")
    return info.get("Hardware") or platform.machine()


def instruction_sets(root: Path = ROOT) -> tuple[str, ...]:
    """Return the supported instruction set extensions that affect the choice of kernels."""
    info = _read_cpuinfo(root)
    flags = (info.get("flags") or info.get("Features") or "").split()
    return tuple(name for name in _ISA_EXTENSIONS if name in flags)


def ram_bytes(root: Path = ROOT) -> int:
    """Return the bytes of physical memory, or the memory limit of the container if it is lower."""
    total_bytes = _read_meminfo(root)["MemTotal"]
    return min(total_bytes, read_memory_cap(root) or total_bytes)


def accelerators(root: Path = ROOT) -> tuple[str, ...]:
    """Return NVIDIA GPUs with their memory, and other accelerators with the device nodes of their drivers."""
    nodes = [(name, path) for glob, name in _ACCELERATOR_NODES.items() for path in sorted(root.glob(glob))]
    return (*_list_nvidia_gpus(), *(f"{name} ({path.relative_to(root)})" for name, path in nodes))


def _list_nvidia_gpus() -> list[str]:
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # there is no NVIDIA driver
        return []
    handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
    return [f"{pynvml.nvmlDeviceGetName(h)} {pynvml.nvmlDeviceGetMemoryInfo(h).total / 2**30:.0f} GiB" for h in handles]


def power_sensors(root: Path = ROOT) -> tuple[str, ...]:
    """Return the RAPL domains and hwmon power inputs that this process may read."""
    domains = sorted((root / "sys/class/powercap").glob("*/energy_uj"))
    inputs = sorted((root / "sys/class/hwmon").glob("hwmon*/power*_input"))
    return tuple(_describe_sensor(path, "name") for path in [*domains, *inputs] if os.access(path, os.R_OK))


def thermal_sensors(root: Path = ROOT) -> tuple[str, ...]:
    """Return the thermal zones and hwmon temperature inputs."""
    zones = sorted((root / "sys/class/thermal").glob("thermal_zone*/temp"))
    inputs = sorted((root / "sys/class/hwmon").glob("hwmon*/temp*_input"))
    return (*(_describe_sensor(path, "type") for path in zones), *(_describe_sensor(path, "name") for path in inputs))


def _describe_sensor(path: Path, label: str) -> str:
    return f"{path.parent.name} {read_text(path.parent / label)}".strip()


def _read_cpuinfo(root: Path) -> dict[str, str]:
    """Return the `name : value` fields of the first processor, and the board fields that ARM kernels add."""
    fields: dict[str, str] = {}
    for line in (root / "proc/cpuinfo").read_text().splitlines():
        name, separator, value = line.partition(":")
        if separator:
            fields.setdefault(name.strip(), value.strip())
    return fields


def _read_meminfo(root: Path) -> dict[str, int]:
    """Return the sizes of /proc/meminfo in bytes."""
    lines = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[2:] == ["kB"]}
