"""How long an engine lets its user wait: cold start, first token, every further token, a queue.

A fresh process does the same decode twice; where the two rounds disagree, something disturbed it. On a virtual machine
it decodes until enough tokens were undisturbed; the others do not count (see edgeopt.machine.contention).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import ClassVar

from edgeopt.core.protocols import GENERATION, Samples, Session, Subject
from edgeopt.core.result import Measurement
from edgeopt.errors import ConfigError, MeasureError
from edgeopt.machine.contention import ContentionProbe, select_undisturbed, time_decode_rounds
from edgeopt.measure.harness.workload import PROMPT_LENGTHS
from edgeopt.measure.stats.aggregate import HALVES, SLOWED
from edgeopt.measure.stats.confidence_intervals import bootstrap_processes, percentile

_PERCENTILES = (50, 95, 99)
_ROUNDS, _MOST_S = 2, 3.0
# shorter rounds hold a few time slices of the scheduler, so their difference says nothing
_COMPARABLE_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """What one user waits for, in processes that nobody else disturbs.

    Attributes:
        decode_tokens: tokens after the first in each of two decodes from the shortest prompt.
        ttft_repeats: how often each prompt is read in a process.
        burst_requests, burst_tokens: a queue that arrives at once and is served one request after another.
    """

    METRICS: ClassVar[Mapping[str, str]] = {
        "latency/cold_start_ms": "ms",
        "latency/load_ms": "ms",
        **{f"latency/ttft_{length}_ms": "ms" for length in PROMPT_LENGTHS},
        **{f"latency/decode_p{percent}_ms": "ms" for percent in _PERCENTILES},
        "latency/burst_ms": "ms",
        "throughput/decode_tokens_per_s": "tokens/s",
    }
    GROUP: ClassVar[str] = GENERATION
    TIMED: ClassVar[bool] = True
    processes: int = 5
    decode_tokens: int = 128
    ttft_repeats: int = 3
    burst_requests: int = 4
    burst_tokens: int = 16

    def __post_init__(self) -> None:
        if self.processes * self.decode_tokens * _ROUNDS < 200:
            raise ConfigError(
                f"{self.processes} processes that decode {self.decode_tokens} tokens twice are fewer than 200 tokens",
                location="decode_tokens",
                hint=f"Give {-(-200 // (_ROUNDS * max(1, self.processes)))} or more",
            )
        for name in ("processes", "ttft_repeats", "burst_requests", "burst_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{getattr(self, name)} measures nothing", location=name, hint="Give 1 or more")

    def collect(self, subject: Subject) -> Samples:
        marks = {name: mark["time_s"] for name, mark in subject.marks.items()}
        shortest = subject.prompts[min(subject.prompts)]
        room = subject.context_length - len(shortest) - 1
        pace = ContentionProbe()

        def ttft(prompt: list[int]) -> float:
            return pace.retry(lambda: _first_token_s(subject.session, prompt))

        ttft_s = {
            str(length): [ttft(prompt) for _ in range(self.ttft_repeats)] for length, prompt in subject.prompts.items()
        }
        count = min(self.decode_tokens, room)
        rounds = time_decode_rounds(subject.session, shortest, count, pace, rounds=_ROUNDS, most_s=_MOST_S)
        own = [select_undisturbed(*one, pace.best_s) for one in rounds]
        counted = [tokens or times for tokens, (times, _) in zip(own, rounds, strict=True)]
        burst_tokens = min(self.burst_tokens, room)
        return {
            "cold_start_s": marks["first_token"] - marks["spawned"],
            "load_s": marks["loaded"] - marks["imported"],
            "ttft_s": ttft_s,
            "decode_prompt_tokens": len(shortest),
            "decode_s": [times for times, _ in rounds],
            "decode_pace_s": [paces for _, paces in rounds],
            "burst_s": pace.retry(lambda: self._burst_s(subject.session, shortest, burst_tokens)),
            SLOWED: max(0.0, 1 - sum(map(len, own)) / (_ROUNDS * count)),
            HALVES: [median(decode) for decode in counted[-_ROUNDS:] if sum(decode) >= _COMPARABLE_S],
        }

    def _burst_s(self, session: Session, prompt: list[int], new_tokens: int) -> float:
        start = time.perf_counter()
        for _ in range(self.burst_requests):
            for _ in session.generate(prompt, new_tokens, stop_at_end=False):
                pass
        return time.perf_counter() - start

    def summarize(self, runs: Sequence[Samples]) -> list[Measurement]:
        processes = f"{len(runs)} fresh processes"
        spread = f"median of {processes}"
        decode = _Tokens.of(runs)
        tokens = f"tokens after a prompt of {runs[0]['decode_prompt_tokens']}, {processes}"
        if decode.left_out:
            how = "of which" if decode.slowed else "without"
            tokens += f", {how} {decode.left_out:.0%} that others on the same physical cores slowed down"
        rates = [[1e3 * len(token_ms) / sum(token_ms)] for token_ms in decode.times_ms]
        burst = f"{self.burst_requests} requests of {self.burst_tokens} tokens, last completion; {spread}"
        return [
            self._figure("latency/cold_start_ms", _ms(runs, "cold_start_s"), f"process start to first token; {spread}"),
            self._figure("latency/load_ms", _ms(runs, "load_s"), f"opening the engine, libraries imported; {spread}"),
            *(
                self._figure(
                    f"latency/ttft_{length}_ms",
                    [[1e3 * s for s in run["ttft_s"][length]] for run in runs],
                    f"prompt of {length} tokens to first token; median over {processes}",
                )
                for length in runs[0]["ttft_s"]
            ),
            *(
                self._figure(f"latency/decode_p{p}_ms", decode.times_ms, f"percentile of {tokens}", percent=p)
                for p in _PERCENTILES
            ),
            self._figure("latency/burst_ms", _ms(runs, "burst_s"), burst),
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


def _ms(runs: Sequence[Samples], key: str) -> list[list[float]]:
    return [[1e3 * run[key]] for run in runs]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tokens:
    """Milliseconds of the tokens that count, as many of each process.

    Attributes:
        left_out: share of those that others on the same physical cores slowed down.
        slowed: no process had the cores for itself for a whole round, so that all tokens count.
    """

    times_ms: list[list[float]]
    left_out: float
    slowed: bool

    @classmethod
    def of(cls, runs: Sequence[Samples]) -> _Tokens:
        """Of those processes that were undisturbed for a round; the fastest moment of all of them tells which were."""
        best_s = min(pace_s for run in runs for paces in run["decode_pace_s"] for pace_s in paces)
        least = min(len(times) for run in runs for times in run["decode_s"])
        every = [[1e3 * s for times in run["decode_s"] for s in times] for run in runs]
        counted = [
            [
                1e3 * s
                for pair in zip(run["decode_s"], run["decode_pace_s"], strict=True)
                for s in select_undisturbed(*pair, best_s)
            ]
            for run in runs
        ]
        left_out = 1 - sum(map(len, counted)) / sum(map(len, every))
        enough = [times for times in counted if len(times) >= least]
        chosen = enough or every
        count = min(map(len, chosen))
        return cls(times_ms=[times[:count] for times in chosen], left_out=left_out, slowed=not enough)


def _first_token_s(session: Session, prompt: list[int]) -> float:
    start = time.perf_counter()
    tokens = session.generate(prompt, 1, stop_at_end=False)
    if next(tokens, None) is None:
        raise MeasureError(f"the engine generated nothing after a prompt of {len(prompt)} tokens")
    return time.perf_counter() - start
