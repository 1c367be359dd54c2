"""Measure latency: cold start, time to first token, time per output token, and a burst of requests.

Each fresh process decodes the same tokens twice; if the two rounds differ, something disturbed it. On a virtual machine
it decodes until enough tokens were free of contention, and ignores the others (see edgeopt.machine.contention).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import ClassVar

from edgeopt.core.protocols import GENERATION_GROUP, ProbeContext, Samples, Session
from edgeopt.core.result import Measurement
from edgeopt.errors import ConfigError, MeasureError
from edgeopt.machine.contention import ContentionProbe, select_undisturbed, time_decode_rounds
from edgeopt.measure.harness.workload import PROMPT_LENGTHS
from edgeopt.measure.stats.aggregate import HALVES, SLOWED
from edgeopt.measure.stats.confidence_intervals import bootstrap_processes, percentile

_PERCENTILES = (50, 95, 99)
_MIN_DECODED_TOKENS = 200
_ROUNDS, _MAX_DECODE_S = 2, 3.0
# a shorter round spans only a few time slices of the scheduler, so rounds would differ by chance
_MIN_COMPARABLE_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Latency for a single user, in fresh processes.

    Attributes:
        processes: number of fresh processes.
        decode_tokens: tokens decoded after the first token, in each of two rounds after the shortest prompt.
        ttft_repeats: number of measurements of each prompt length per process.
        burst_requests: number of requests that arrive at once and are served one after another.
        burst_tokens: tokens generated per request of the burst.

    Raises ConfigError if a value is below 1 or all processes together decode fewer than 200 tokens.
    """

    METRICS: ClassVar[Mapping[str, str]] = {
        "latency/cold_start_ms": "ms",
        "latency/load_ms": "ms",
        **{f"latency/ttft_{length}_ms": "ms" for length in PROMPT_LENGTHS},
        **{f"latency/decode_p{percent}_ms": "ms" for percent in _PERCENTILES},
        "latency/burst_ms": "ms",
        "throughput/decode_tokens_per_s": "tokens/s",
    }
    GROUP: ClassVar[str] = GENERATION_GROUP
    TIMING_SENSITIVE: ClassVar[bool] = True
    processes: int = 5
    decode_tokens: int = 128
    ttft_repeats: int = 3
    burst_requests: int = 4
    burst_tokens: int = 16

    def __post_init__(self) -> None:
        decoded = self.processes * self.decode_tokens * _ROUNDS
        if decoded < _MIN_DECODED_TOKENS:
            raise ConfigError(
                f"all processes together must decode at least {_MIN_DECODED_TOKENS} tokens, got {decoded}",
                location="decode_tokens",
                hint=f"Use {-(-_MIN_DECODED_TOKENS // (_ROUNDS * max(1, self.processes)))} or more",
            )
        for name in ("processes", "ttft_repeats", "burst_requests", "burst_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"`{name}` must be at least 1, got {getattr(self, name)}", location=name, hint="Use 1 or more"
                )

    def collect(self, context: ProbeContext) -> Samples:
        """Return the times in seconds of start-up, first tokens, decoded tokens and the burst.

        `decode_pace_s` has the contention probe's time for each decoded token.
        """
        marks = {name: mark["time_s"] for name, mark in context.marks.items()}
        shortest = context.prompts[min(context.prompts)]
        available_tokens = context.context_length - len(shortest) - 1
        contention = ContentionProbe()

        def ttft(prompt: list[int]) -> float:
            return contention.retry(lambda: _first_token_s(context.session, prompt))

        ttft_s = {
            str(length): [ttft(prompt) for _ in range(self.ttft_repeats)] for length, prompt in context.prompts.items()
        }
        count = min(self.decode_tokens, available_tokens)
        rounds = time_decode_rounds(
            context.session, shortest, count, contention, rounds=_ROUNDS, timeout_s=_MAX_DECODE_S
        )
        undisturbed = [select_undisturbed(times, paces, contention.best_s) for times, paces in rounds]
        compared = [selected or times for selected, (times, _) in zip(undisturbed, rounds, strict=True)]
        burst_tokens = min(self.burst_tokens, available_tokens)
        return {
            "cold_start_s": marks["first_token"] - marks["spawned"],
            "load_s": marks["loaded"] - marks["imported"],
            "ttft_s": ttft_s,
            "decode_prompt_tokens": len(shortest),
            "decode_s": [times for times, _ in rounds],
            "decode_pace_s": [paces for _, paces in rounds],
            "burst_s": contention.retry(lambda: self._burst_s(context.session, shortest, burst_tokens)),
            SLOWED: max(0.0, 1 - sum(map(len, undisturbed)) / (_ROUNDS * count)),
            HALVES: [median(times) for times in compared[-_ROUNDS:] if sum(times) >= _MIN_COMPARABLE_S],
        }

    def _burst_s(self, session: Session, prompt: list[int], new_tokens: int) -> float:
        start = time.perf_counter()
        for _ in range(self.burst_requests):
            for _ in session.generate(prompt, new_tokens, stop_at_end=False):
                pass
        return time.perf_counter() - start

    def summarize(self, runs: Sequence[Samples]) -> list[Measurement]:
        """Return the metrics as medians over processes and percentiles over decoded tokens."""
        processes = f"{len(runs)} fresh processes"
        statistic = f"median of {processes}"
        decode = _DecodedTokens.from_runs(runs)
        tokens = f"tokens after a prompt of {runs[0]['decode_prompt_tokens']}, {processes}"
        if decode.slowed_share:
            verb = "including" if decode.includes_slowed else "excluding"
            tokens += f", {verb} {decode.slowed_share:.0%} slowed down by contention"
        rates = [[1e3 * len(token_ms) / sum(token_ms)] for token_ms in decode.times_ms]
        burst = f"{self.burst_requests} requests of {self.burst_tokens} tokens, last completion; {statistic}"
        return [
            self._figure(
                "latency/cold_start_ms", _to_ms(runs, "cold_start_s"), f"process start to first token; {statistic}"
            ),
            self._figure(
                "latency/load_ms", _to_ms(runs, "load_s"), f"opening the engine after importing libraries; {statistic}"
            ),
            *(
                self._figure(
                    f"latency/ttft_{length}_ms",
                    [[1e3 * s for s in run["ttft_s"][length]] for run in runs],
                    f"prompt of {length} tokens to first token; median over {processes}",
                )
                for length in runs[0]["ttft_s"]
            ),
            *(
                self._figure(f"latency/decode_p{p}_ms", decode.times_ms, f"p{p} of {tokens}", percent=p)
                for p in _PERCENTILES
            ),
            self._figure("latency/burst_ms", _to_ms(runs, "burst_s"), burst),
            self._figure("throughput/decode_tokens_per_s", rates, f"{tokens}; median"),
        ]

    def _figure(self, metric: str, runs: list[list[float]], method: str, percent: float = 50) -> Measurement:
        value, low, high = bootstrap_processes(runs, percentile(percent))
        return Measurement(
            metric=metric,
            unit=self.METRICS[metric],
            value=value,
            low=low,
            high=high,
            count=sum(len(run) for run in runs),
            method=method,
        )


def _to_ms(runs: Sequence[Samples], key: str) -> list[list[float]]:
    return [[1e3 * run[key]] for run in runs]


@dataclass(frozen=True, slots=True, kw_only=True)
class _DecodedTokens:
    """Times of the decoded tokens that enter the statistics.

    Attributes:
        times_ms: milliseconds per token, the same number of tokens for each process.
        slowed_share: share of all tokens that contention slowed down.
        includes_slowed: no process had a full round without contention, so that all tokens are included.
    """

    times_ms: list[list[float]]
    slowed_share: float
    includes_slowed: bool

    @classmethod
    def from_runs(cls, runs: Sequence[Samples]) -> _DecodedTokens:
        """Select the tokens of the processes with a full round without contention, else all tokens.

        The fastest time of the contention probe in all processes is the reference for contention.
        """
        best_s = min(pace_s for run in runs for paces in run["decode_pace_s"] for pace_s in paces)
        round_tokens = min(len(times) for run in runs for times in run["decode_s"])
        all_ms = [[1e3 * s for times in run["decode_s"] for s in times] for run in runs]
        undisturbed_ms = [
            [
                1e3 * s
                for times, paces in zip(run["decode_s"], run["decode_pace_s"], strict=True)
                for s in select_undisturbed(times, paces, best_s)
            ]
            for run in runs
        ]
        slowed_share = 1 - sum(map(len, undisturbed_ms)) / sum(map(len, all_ms))
        full_rounds_ms = [times for times in undisturbed_ms if len(times) >= round_tokens]
        selected = full_rounds_ms or all_ms
        count = min(map(len, selected))
        return cls(
            times_ms=[times[:count] for times in selected],
            slowed_share=slowed_share,
            includes_slowed=not full_rounds_ms,
        )


def _first_token_s(session: Session, prompt: list[int]) -> float:
    start = time.perf_counter()
    tokens = session.generate(prompt, 1, stop_at_end=False)
    if next(tokens, None) is None:
        raise MeasureError(f"the engine must generate at least one token, got none after {len(prompt)} prompt tokens")
    return time.perf_counter() - start
