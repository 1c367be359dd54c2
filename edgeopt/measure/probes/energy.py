"""Measure the energy of sustained decoding with codecarbon, separately for CPU, GPU and RAM.

An energy value is measured if the system has a counter (RAPL, NVML, the PMIC of a Raspberry Pi). Otherwise codecarbon
models the device from its load, an assumed TDP and watts per memory module, and the value is estimated. Measured and
estimated values have different metric names.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from edgeopt.core.protocols import ProbeContext, Samples, Session
from edgeopt.core.result import Measurement
from edgeopt.errors import ConfigError, MeasureError
from edgeopt.machine.codecarbon_meter import J_PER_KWH, Kind, create_quiet_tracker, describe_instrument
from edgeopt.measure.stats.confidence_intervals import bootstrap_processes, median

_COMPONENTS = ("cpu", "gpu", "ram")
_MIN_ROUND_S = 0.125  # codecarbon reads 0 J for a round of 50 ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy:
    """Energy per decoded token and power of decoding.

    Attributes:
        seconds: total duration of decoding.
        rounds: number of rounds of equal duration; each is tracked separately.
        tokens: tokens generated per sequence after the shortest prompt.

    Raises ConfigError for a value below its minimum.
    """

    METRICS: ClassVar[Mapping[str, str]] = {
        **{
            f"energy/{kind}/{component}_j_per_token": "J"
            for kind in ("measured", "estimated")
            for component in _COMPONENTS
        },
        "energy/measured/power_w": "W",
        "energy/estimated/power_w": "W",
    }
    GROUP: ClassVar[str] = "energy"
    TIMING_SENSITIVE: ClassVar[bool] = True
    processes: int = 1
    seconds: float = 2.0
    rounds: int = 3
    tokens: int = 128

    def __post_init__(self) -> None:
        for name in ("processes", "rounds", "tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"`{name}` must be at least 1, got {getattr(self, name)}", location=name, hint="Use 1 or more"
                )
        minimum_s = _MIN_ROUND_S * self.rounds
        if not self.seconds >= minimum_s:
            raise ConfigError(
                f"`seconds` must be at least {minimum_s:g} for {self.rounds} rounds, got {self.seconds:g}",
                location="seconds",
                hint=f"Use {minimum_s:g} or more",
            )

    def collect(self, context: ProbeContext) -> Samples:
        """Decode in rounds; return tokens, seconds and joules of each, and the instruments.

        Raises MeasureError if codecarbon returns no data or the engine generates no token.
        """
        tracker = create_quiet_tracker()
        prompt = context.prompts[min(context.prompts)]
        new_tokens = min(self.tokens, context.context_length - len(prompt))
        rounds: list[dict[str, Any]] = []
        for number in range(self.rounds):
            tracker.start_task(str(number))
            decoded, elapsed_s = _decode_for(context.session, prompt, new_tokens, self.seconds / self.rounds)
            data = tracker.stop_task(str(number))
            if data is None:
                raise MeasureError(
                    "codecarbon must report the energy of every round, got none",
                    hint="Read its messages in the log of this process",
                )
            energy_j = {name: getattr(data, f"{name}_energy") * J_PER_KWH for name in _COMPONENTS}
            rounds.append({"tokens": decoded, "decode_s": elapsed_s, "tracked_s": data.duration, "energy_j": energy_j})
        return {
            # codecarbon's public results do not name the instrument, so its private list is read
            "instruments": [list(describe_instrument(hardware)) for hardware in tracker._hardware],
            "rounds": rounds,
            "halves": [rounds[i]["decode_s"] / rounds[i]["tokens"] for i in (0, -1)],
        }

    def summarize(self, runs: Sequence[Samples]) -> list[Measurement]:
        """Return joules per token of each component and the total power, as medians over rounds.

        Joules per token are watts times decoding seconds per token, because the tracked time exceeds the decoding time.
        """
        rounds = [sample for run in runs for sample in run["rounds"]]
        instruments = runs[0]["instruments"]
        watts = {name: [r["energy_j"][name] / r["tracked_s"] for r in rounds] for name, _, _ in instruments}
        statistic = f"median of {len(rounds)} rounds"
        measurements = [
            self._measurement(
                kind,
                f"{name}_j_per_token",
                [w * r["decode_s"] / r["tokens"] for w, r in zip(watts[name], rounds, strict=True)],
                f"{method}; {statistic}",
            )
            for name, kind, method in instruments
        ]
        total_watts = [sum(components) for components in zip(*watts.values(), strict=True)]
        # one estimated component makes the total an estimate
        total_kind: Kind = "measured" if all(kind == "measured" for _, kind, _ in instruments) else "estimated"
        components = " + ".join(f"{name} ({kind})" for name, kind, _ in instruments)
        return [*measurements, self._measurement(total_kind, "power_w", total_watts, f"{components}; {statistic}")]

    def _measurement(self, kind: Kind, name: str, values: list[float], method: str) -> Measurement:
        metric = f"energy/{kind}/{name}"
        value, low, high = bootstrap_processes([[value] for value in values], median)
        unit, count = self.METRICS[metric], len(values)
        return Measurement(
            metric=metric, unit=unit, value=value, low=low, high=high, count=count, method=method, kind=kind
        )


def _decode_for(session: Session, prompt: list[int], new_tokens: int, seconds: float) -> tuple[int, float]:
    """Decode one sequence after another for at least `seconds`; return (tokens, elapsed seconds)."""
    decoded = 0
    start = time.perf_counter()
    while True:
        before = decoded
        for _ in session.generate(prompt, new_tokens, stop_at_end=False):
            decoded += 1
            elapsed_s = time.perf_counter() - start
            if elapsed_s >= seconds:
                return decoded, elapsed_s
        if decoded == before:
            raise MeasureError(
                f"the engine must generate at least one token, got none after {len(prompt)} prompt tokens"
            )
