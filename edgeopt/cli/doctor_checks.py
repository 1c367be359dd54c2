"""Check what this machine can build, run and measure."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "onnxruntime",
    "onnxruntime-genai",
    "mlflow",
    "optuna",
    "hydra-core",
    "codecarbon",
)
FREE_DISK_BYTES = 5 * 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was checked.

    Attributes:
        what: name of the check.
        good: False if something is missing.
        found: what was found.
        hint: what to do if `good` is False.
    """

    what: str
    good: bool
    found: str
    hint: str = ""


def diagnose() -> list[Check]:
    """Return all checks: libraries, the machine, optional features."""
    return [*_libraries(), *_machine(), *_optional()]


def _libraries() -> Iterator[Check]:
    for name in LIBRARIES:
        try:
            yield Check(what=name, good=True, found=metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Check(what=name, good=False, found="not installed", hint="pip install edgeopt")


def _machine() -> Iterator[Check]:
    from edgeopt.machine.inventory import detect_device

    device = detect_device(measure_rates=False)
    yield Check(
        what="processor",
        good=True,
        found=f"{device.cpu}, {device.cores} cores, {', '.join(device.isa) or 'no vector units known'}",
    )
    yield Check(
        what="memory",
        good=device.ram_bytes > 2**31,
        found=f"{device.ram_bytes / 2**30:.1f} GiB",
        hint="use a machine with at least 2 GiB",
    )
    free = shutil.disk_usage(Path.cwd()).free
    yield Check(
        what="free disk here",
        good=free > FREE_DISK_BYTES,
        found=f"{free / 2**30:.1f} GiB",
        hint="free 5 GiB, or set state",
    )
    vnni = any("vnni" in isa or isa in ("asimddp", "i8mm") for isa in device.isa)
    yield Check(
        what="int8 dot product",
        good=vnni,
        found="present" if vnni else "not found",
        hint="" if vnni else "int8 and int4 engines run, but gain less speed",
    )
    readable = Path("/proc/self/smaps_rollup").exists()
    yield Check(
        what="measure memory",
        good=readable,
        found="/proc" if readable else "no /proc",
        hint="" if readable else "use Linux",
    )
    yield Check(
        what="measure energy",
        good=bool(device.power_sensors),
        found=", ".join(device.power_sensors) or "no power sensor",
        hint="" if device.power_sensors else "energy is estimated: limits on energy/measured/… are never satisfied",
    )
    yield Check(
        what="read temperature",
        good=bool(device.thermal_sensors),
        found=", ".join(device.thermal_sensors) or "no thermal sensor",
        hint="" if device.thermal_sensors else "thermal throttling is not detected",
    )


def _optional() -> Iterator[Check]:
    for module, what, extra in (
        ("tensorrt", "TensorRT engines", "tensorrt"),
        ("datasets", "texts from a hub", "hub"),
        ("lm_eval", "task accuracy", "tasks"),
        ("psycopg", "PostgreSQL studies", "postgres"),
    ):
        present = find_spec(module) is not None
        yield Check(
            what=what,
            good=present,
            found="present" if present else "not found",
            hint="" if present else f"pip install 'edgeopt[{extra}]'",
        )
