"""What an evaluation spends: joules of this process and those it starts, by codecarbon."""

from __future__ import annotations

from typing import Any

from edgeopt.measure.probes.energy import instrument, silent_tracker

_J_PER_KWH = 3.6e6


class Meter:
    """One for a process; made once, because codecarbon takes two seconds to find its instruments.

    Where no counter can be read the joules are a model's, as `method` says.
    """

    def __init__(self) -> None:
        self._tracker = silent_tracker(tracking_mode="process", allow_multiple_runs=True)
        self._task = 0
        self._tracker.start_task("0")

    def joules(self) -> float:
        """Joules since the last call, or since this was made."""
        data: Any = self._tracker.stop_task(str(self._task))
        self._task += 1
        self._tracker.start_task(str(self._task))
        return 0.0 if data is None else float(data.energy_consumed) * _J_PER_KWH

    @property
    def method(self) -> str:
        """Each part with whether it is measured or estimated."""
        parts = [instrument(hardware) for hardware in self._tracker._hardware]
        return ", ".join(f"{part} {kind}" for part, kind, _ in parts) + ", by codecarbon for this process"
