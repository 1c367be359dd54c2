"""One dimension of a search space."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.distributions import BaseDistribution

Params = dict[str, Any]
"""Values by the config key that they override."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One dimension: `choices`, or a range from `low` to `high`.

    Attributes:
        key: the override that it sets, such as `recipe` or `step.prune.ratio`.
        step: spacing of the values of a range; None for any value between.
        log: whether the range is searched on a logarithmic scale.
        when: values of parameters listed before, for which this one exists.
    """

    key: str
    choices: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None
    step: float | None = None
    log: bool = False
    when: Mapping[str, tuple[Any, ...]]

    @classmethod
    def parse(cls, key: str, data: Mapping[str, Any]) -> Parameter:
        """One entry under `search.parameters`. Raises ConfigError naming the key."""
        location = f"search.parameters.{key}"
        if not isinstance(data, Mapping) or not isinstance(data.get("when", {}), Mapping):
            raise ConfigError(
                f"{data!r} is not understood",
                location=location,
                hint="Give choices, or low and high; `when` is a mapping",
            )
        unknown = sorted(set(data) - {"choices", "low", "high", "step", "log", "when"})
        if unknown:
            raise ConfigError(
                f"unknown key {unknown[0]!r}",
                location=location,
                hint="Give choices, or low, high, step and log; and when",
            )
        when = {k: tuple(v) if isinstance(v, list) else (v,) for k, v in data.get("when", {}).items()}
        if "choices" in data:
            if not data["choices"] or not isinstance(data["choices"], (list, tuple)):
                raise ConfigError(f"{data['choices']!r} lists no choices", location=location, hint="List at least one")
            return cls(key=key, choices=tuple(data["choices"]), when=when)
        low, high = data.get("low"), data.get("high")
        if not isinstance(low, (int, float)) or not isinstance(high, (int, float)) or low > high:
            raise ConfigError(
                f"{low} to {high} is no range", location=location, hint="Give choices, or low and high with low ≤ high"
            )
        if data.get("log") and (low <= 0 or "step" in data):
            raise ConfigError("a logarithmic range starts above zero and has no step", location=location)
        step = data.get("step")
        if step is not None and not (isinstance(step, (int, float)) and step > 0):
            raise ConfigError(
                f"{step!r} is no step", location=location, hint="Give a number above zero, or leave it out"
            )
        return cls(key=key, low=low, high=high, step=step, log=bool(data.get("log")), when=when)

    def exists(self, params: Params) -> bool:
        return all(key in params and params[key] in values for key, values in self.when.items())

    def holds(self, value: Any) -> bool:
        """Whether the search could propose `value`."""
        if self.choices:
            return value in self.choices
        low, high = self.low or 0, self.high or 0
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            return False
        if self.whole and not isinstance(value, int):
            return False
        return self.step is None or math.isclose(
            round((value - low) / self.step) * self.step, value - low, abs_tol=1e-9
        )

    def normal(self, value: Any) -> Any:
        """`value`, which it holds, as the search itself would write it: 1.0 of a range of fractions, and not 1."""
        if self.choices:
            return self.choices[self.choices.index(value)]
        return self._nth(self._place(value)) if self.step else (value if self.whole else float(value))

    @property
    def whole(self) -> bool:
        """Whether a range holds whole numbers alone."""
        return isinstance(self.low, int) and isinstance(self.high, int) and isinstance(self.step, (int, type(None)))

    @property
    def ends(self) -> tuple[Any, ...]:
        """Every choice, or both ends of the range."""
        return self.choices or (self._bounds if self.count == math.inf else (self._nth(0), self._nth(-1)))

    @property
    def distribution(self) -> BaseDistribution:
        """As Optuna sees it."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(self.choices)
        low, high = self.ends
        if self.whole:
            return IntDistribution(low, high, step=int(self.step or 1), log=self.log)
        return FloatDistribution(low, high, step=self.step, log=self.log)

    def suggest(self, trial: Trial) -> Any:
        """The value that Optuna proposes for a trial."""
        if self.choices:
            return trial.suggest_categorical(self.key, self.choices)
        low, high = self.ends
        if self.whole:
            return trial.suggest_int(self.key, low, high, step=int(self.step or 1), log=self.log)
        value = trial.suggest_float(self.key, low, high, step=self.step, log=self.log)
        return self._nth(self._place(value)) if self.step else self.rounded(value)

    def rounded(self, value: float) -> float:
        """Six digits read well, also of a learning rate of 1e-7."""
        low, high = self._bounds
        return float(min(max(float(f"{value:.6g}"), low), high))

    def neighbours(self, value: Any) -> list[Any]:
        """The values next to `value`: other choices, those beside it where choices are numbers, or one step away.

        A range without steps is taken in tenths.
        """
        if self.choices:
            if not all(isinstance(c, (int, float)) and not isinstance(c, bool) for c in self.choices):
                return [choice for choice in self.choices if choice != value]
            ordered = sorted(self.choices)
            location = ordered.index(value)
            return [ordered[n] for n in (location - 1, location + 1) if 0 <= n < len(ordered)]
        if self.step:
            location = self._place(value)
            return [self._nth(n) for n in (location - 1, location + 1) if 0 <= n < self.count]
        low, high = self._bounds
        if self.log:
            factor = max((high / low) ** 0.1, 1 + 1 / value if self.whole else 1.0)
            found = [value / factor, value * factor]
        else:
            tenth = max((high - low) / 10, 1 if self.whole else 0)
            found = [value - tenth, value + tenth]
        near = [round(v) for v in found] if self.whole else [self.rounded(v) for v in found]
        return [v for v in near if low <= v <= high and v != value]

    def draw(self, chance: random.Random) -> Any:
        """A value at random."""
        if self.choices:
            return chance.choice(self.choices)
        low, high = self._bounds
        if self.log:
            value = math.exp(chance.uniform(math.log(low), math.log(high)))
            return round(value) if self.whole else self.rounded(value)
        if self.count < math.inf:
            return self._nth(chance.randrange(int(self.count)))
        return self.rounded(chance.uniform(low, high))

    def places(self, params: Params) -> list[float]:
        """Where the value of `params` stands: numbers from 0 to 1, other choices one by one; zeros for none."""
        numbers = not self.choices or all(isinstance(c, (int, float)) and not isinstance(c, bool) for c in self.choices)
        value = params.get(self.key)
        if not numbers:
            return [float(self.key in params and value == choice) for choice in self.choices]
        if self.key not in params or value is None:
            return [0.0]
        ends = (min(self.choices), max(self.choices)) if self.choices else (self.low or 0, self.high or 0)
        low, high, at = (math.log(x) if self.log else float(x) for x in (*ends, value))
        return [(at - low) / (high - low) if high > low else 0.0]

    @property
    def count(self) -> float:
        """How many values there are."""
        if self.choices:
            return len(self.choices)
        step = self.step or (1 if self.whole else 0)
        return math.floor(((self.high or 0) - (self.low or 0)) / step + 1e-9) + 1 if step else math.inf

    @property
    def values(self) -> tuple[Any, ...]:
        """All of them, of which there must be finitely many."""
        return self.choices or tuple(map(self._nth, range(int(self.count))))

    @property
    def _bounds(self) -> tuple[Any, Any]:
        """Of one type, so that equal values are the same recipe."""
        kind = int if self.whole else float
        return kind(self.low or 0), kind(self.high or 0)

    def _nth(self, n: int) -> Any:
        """The value after `n` steps, or that before the end where `n` is below 0."""
        (low, high), step = self._bounds, self.step or 1
        value = low + (n if n >= 0 else int(self.count) + n) * step
        return value if self.whole else min(max(float(f"{value:.15g}"), low), high)  # 0.3, not 0.30000000000000004

    def _place(self, value: float) -> int:
        """After how many steps `value` stands."""
        return round((value - (self.low or 0)) / (self.step or 1))
