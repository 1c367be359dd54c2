"""Measure energy with codecarbon: per component, and in total for this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from codecarbon import OfflineEmissionsTracker

Kind = Literal["measured", "estimated"]
J_PER_KWH = 3.6e6


class EnergyMeter:
    """Meter of the energy that this process and its children use, in joules.

    Create one meter per process: codecarbon needs two seconds to detect its instruments. Without a readable energy
    counter, codecarbon estimates the energy with a model; `method` says which components are estimated.
    """

    def __init__(self) -> None:
        self._tracker = create_quiet_tracker(tracking_mode="process", allow_multiple_runs=True)
        self._task = 0
        self._tracker.start_task("0")

    def joules(self) -> float:
        """Return the joules since the last call, or since the meter was created."""
        data: Any = self._tracker.stop_task(str(self._task))
        self._task += 1
        self._tracker.start_task(str(self._task))
        return 0.0 if data is None else float(data.energy_consumed) * J_PER_KWH

    @property
    def method(self) -> str:
        """Return a description that marks each component as "measured" or "estimated"."""
        components = [describe_instrument(hardware) for hardware in self._tracker._hardware]
        return ", ".join(f"{name} {kind}" for name, kind, _ in components) + ", by codecarbon for this process"


def create_quiet_tracker(**settings: Any) -> OfflineEmissionsTracker:
    """Create a codecarbon tracker that writes no files and logs errors only."""
    from codecarbon import OfflineEmissionsTracker
    from codecarbon.external.logger import set_logger_level

    set_logger_level("error")  # before the constructor: it logs before it reads its own `log_level`
    # The country decides emissions, which edgeopt does not report. It does not affect energy.
    return OfflineEmissionsTracker(country_iso_code="USA", output_methods=[], log_level="error", **settings)


def describe_instrument(hardware: Any) -> tuple[str, Kind, str]:
    """Return (component, kind, method) of a codecarbon hardware object.

    An unknown hardware class counts as estimated.
    """
    name = type(hardware).__name__
    mode = getattr(hardware, "_mode", "")
    if name == "CPU" and mode == "intel_rapl":
        return "cpu", "measured", "RAPL counter of the processor package"
    if name == "GPU":
        return "gpu", "measured", "energy counter of the whole accelerator (NVML, AMD SMI)"
    if name == "Raspberry":
        return hardware.chip_part.lower(), "measured", "power rails read by the Raspberry Pi's PMIC"
    if name == "RAM":
        return "ram", "estimated", "codecarbon's power model of the memory modules"
    if name == "CPU":
        return "cpu", "estimated", f"codecarbon's model {mode}: machine load and {hardware._tdp} W of TDP"
    return getattr(hardware, "chip_part", name).lower(), "estimated", f"codecarbon's {name}"
