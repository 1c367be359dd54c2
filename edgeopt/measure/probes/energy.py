"""Energy of sustained decoding, by codecarbon: processor, accelerator and memory apart.

Where the system offers a counter (RAPL, NVML, the PMIC of a Raspberry Pi) a figure is measured;
elsewhere codecarbon models the device (load and an assumed TDP, watts for each memory module) and the
figure is estimated. The two never share a name.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from edgeopt.core.protocols import Samples, Session, Subject
from edgeopt.core.result import Measurement
from edgeopt.errors import ConfigError, MeasureError
from edgeopt.machine.codecarbon_meter import J_PER_KWH, Kind, create_quiet_tracker, describe_instrument
from edgeopt.measure.stats.confidence_intervals import bootstrap_processes, median

_PARTS = ("cpu", "gpu", "ram")
_SHORTEST_S = 0.125  # of a round: codecarbon reads 0 J off one that lasts 50 ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy:
    """`seconds` of decoding in `rounds` equal parts, each tracked on its own.

    Attributes:
        tokens: generated after the shortest prompt before the next sequence begins.
    """

    METRICS: ClassVar[Mapping[str, str]] = {
        **{f"energy/{kind}/{part}_j_per_token": "J" for kind in ("measured", "estimated") for part in _PARTS},
        "energy/measured/power_w": "W",
        "energy/estimated/power_w": "W",
    }
    GROUP: ClassVar[str] = "energy"
    TIMED: ClassVar[bool] = True
    processes: int = 1
    seconds: float = 2.0
    rounds: int = 3
    tokens: int = 128

    def __post_init__(self) -> None:
        for name in ("processes", "rounds", "tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{getattr(self, name)} measures nothing", location=name, hint="Give 1 or more")
        if not self.seconds >= _SHORTEST_S * self.rounds:
            raise ConfigError(
                f"{self.seconds:g} s are too short for {self.rounds} rounds",
                location="seconds",
                hint=f"Give {_SHORTEST_S * self.rounds:g} or more",
            )

    def collect(self, subject: Subject) -> Samples:
        tracker = create_quiet_tracker()
        prompt = subject.prompts[min(subject.prompts)]
        new_tokens = min(self.tokens, subject.context_length - len(prompt))
        rounds: list[dict[str, Any]] = []
        for number in range(self.rounds):
            tracker.start_task(str(number))
            decoded, elapsed_s = _decode_for(subject.session, prompt, new_tokens, self.seconds / self.rounds)
            data = tracker.stop_task(str(number))
            if data is None:
                raise MeasureError("codecarbon gave no figures", hint="Read its messages in the log of this process")
            energy_j = {part: getattr(data, f"{part}_energy") * J_PER_KWH for part in _PARTS}
            rounds.append({"tokens": decoded, "decode_s": elapsed_s, "tracked_s": data.duration, "energy_j": energy_j})
        return {
            # codecarbon tells only here what it reads; its public results name no instrument
            "instruments": [list(describe_instrument(hardware)) for hardware in tracker._hardware],
            "rounds": rounds,
            "halves": [rounds[i]["decode_s"] / rounds[i]["tokens"] for i in (0, -1)],
        }

    def summarize(self, runs: Sequence[Samples]) -> list[Measurement]:
        rounds = [each for run in runs for each in run["rounds"]]
        instruments = runs[0]["instruments"]
        watts = {part: [r["energy_j"][part] / r["tracked_s"] for r in rounds] for part, _, _ in instruments}
        over = f"median of {len(rounds)} rounds"
        figures = [
            self._figure(
                kind,
                f"{part}_j_per_token",
                [w * r["decode_s"] / r["tokens"] for w, r in zip(watts[part], rounds, strict=True)],
                f"{method}; {over}",
            )
            for part, kind, method in instruments
        ]
        total = [sum(parts) for parts in zip(*watts.values(), strict=True)]
        # one modelled part makes the whole an estimate
        whole: Kind = "measured" if all(kind == "measured" for _, kind, _ in instruments) else "estimated"
        how = " + ".join(f"{part} ({kind})" for part, kind, _ in instruments)
        return [*figures, self._figure(whole, "power_w", total, f"{how}; {over}")]

    def _figure(self, kind: Kind, name: str, figures: list[float], method: str) -> Measurement:
        metric = f"energy/{kind}/{name}"
        value, low, high = bootstrap_processes([[figure] for figure in figures], median)
        unit, count = self.METRICS[metric], len(figures)
        return Measurement(
            metric=metric, unit=unit, value=value, low=low, high=high, count=count, method=method, kind=kind
        )


def _decode_for(session: Session, prompt: list[int], new_tokens: int, seconds: float) -> tuple[int, float]:
    """(tokens, seconds) of decoding sequence after sequence for at least `seconds`."""
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
            raise MeasureError(f"the engine generated nothing after a prompt of {len(prompt)} tokens")
