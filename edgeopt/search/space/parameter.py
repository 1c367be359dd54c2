"""Define one dimension of a search space: choices, or a range of numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

Params = dict[str, Any]
"""Values by the config key that they override."""
_FORM_HINT = "Use `choices`, or `low` and `high` with optional `step` or `log`; `when` is a mapping"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One dimension: `choices`, or a range from `low` to `high`.

    Attributes:
        key: config key that it overrides, such as `recipe` or `step.prune.ratio`.
        step: spacing of the values of a range; None for a continuous range, or for all integers between two integers.
        log: True to search the range on a logarithmic scale.
        when: values of earlier parameters for which this parameter is active.
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
        """Build a parameter from its entry in `search.parameters`. Raises ConfigError that names the key."""
        location = f"search.parameters.{key}"
        if not isinstance(data, Mapping) or not isinstance(data.get("when", {}), Mapping):
            raise ConfigError(f"a parameter must be a mapping, got {data!r}", location=location, hint=_FORM_HINT)
        unknown = sorted(set(data) - {"choices", "low", "high", "step", "log", "when"})
        if unknown:
            raise ConfigError(f"unknown key {unknown[0]!r}", location=location, hint=_FORM_HINT)
        when = {k: tuple(v) if isinstance(v, list) else (v,) for k, v in data.get("when", {}).items()}
        if "choices" in data:
            if not data["choices"] or not isinstance(data["choices"], (list, tuple)):
                raise ConfigError(
                    f"`choices` must be a list of at least one value, got {data['choices']!r}", location=location
                )
            return cls(key=key, choices=tuple(data["choices"]), when=when)
        low, high = data.get("low"), data.get("high")
        if not (_is_number(low) and _is_number(high) and low <= high):
            raise ConfigError(
                f"`low` and `high` must be finite numbers with low ≤ high, got {low!r} and {high!r}",
                location=location,
                hint=_FORM_HINT,
            )
        if data.get("log") and (low <= 0 or "step" in data):
            raise ConfigError("a logarithmic range must start above 0 and have no `step`", location=location)
        step = data.get("step")
        if step is not None and not (_is_number(step) and step > 0):
            raise ConfigError(
                f"`step` must be a number above 0, got {step!r}", location=location, hint="Change it or remove it"
            )
        return cls(key=key, low=low, high=high, step=step, log=bool(data.get("log")), when=when)

    def is_active(self, params: Params) -> bool:
        """Return True if the values of earlier parameters satisfy the condition `when`."""
        return all(key in params and params[key] in values for key, values in self.when.items())

    def contains(self, value: Any) -> bool:
        """Return True if the search could propose `value`."""
        if self.choices:
            return value in self.choices
        low, high = self.low or 0, self.high or 0
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            return False
        if self.is_integer and not isinstance(value, int):
            return False
        return self.step is None or math.isclose(
            round((value - low) / self.step) * self.step, value - low, abs_tol=1e-9
        )

    def normalize(self, value: Any) -> Any:
        """Return `value` in the type that the search proposes, such as 1.0 for 1 in a range of floats."""
        if self.choices:
            return self.choices[self.choices.index(value)]
        return self._value_at(self._step_index(value)) if self.step else (value if self.is_integer else float(value))

    @property
    def is_integer(self) -> bool:
        """Return True for a range of integers."""
        return isinstance(self.low, int) and isinstance(self.high, int) and isinstance(self.step, (int, type(None)))

    @property
    def endpoints(self) -> tuple[Any, ...]:
        """Return all choices, or both ends of the range."""
        return self.choices or (self._bounds if self.count == math.inf else (self._value_at(0), self._value_at(-1)))

    @property
    def distribution(self) -> BaseDistribution:
        """Return the Optuna distribution."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(self.choices)
        low, high = self.endpoints
        if self.is_integer:
            return IntDistribution(low, high, step=int(self.step or 1), log=self.log)
        return FloatDistribution(low, high, step=self.step, log=self.log)

    def suggest(self, trial: optuna.Trial) -> Any:
        """Return the value that Optuna proposes for a trial."""
        if self.choices:
            return trial.suggest_categorical(self.key, self.choices)
        low, high = self.endpoints
        if self.is_integer:
            return trial.suggest_int(self.key, low, high, step=int(self.step or 1), log=self.log)
        value = trial.suggest_float(self.key, low, high, step=self.step, log=self.log)
        return self._value_at(self._step_index(value)) if self.step else self.round_value(value)

    def round_value(self, value: float) -> float:
        """Round to six significant digits within the range. Rounding to decimal places would turn 1e-7 into 0."""
        low, high = self._bounds
        return float(min(max(float(f"{value:.6g}"), low), high))

    def neighbours(self, value: Any) -> list[Any]:
        """Return the values next to `value`.

        These are all other choices, the adjacent choices if all choices are numbers, or the values one step away. The
        step of a range without `step` is a tenth of the range.
        """
        if self.choices:
            if not self._has_numeric_choices:
                return [choice for choice in self.choices if choice != value]
            ordered = sorted(self.choices)
            index = ordered.index(value)
            return [ordered[n] for n in (index - 1, index + 1) if 0 <= n < len(ordered)]
        if self.step:
            index = self._step_index(value)
            return [self._value_at(n) for n in (index - 1, index + 1) if 0 <= n < self.count]
        low, high = self._bounds
        if self.log:
            factor = max((high / low) ** 0.1, 1 + 1 / value if self.is_integer else 1.0)
            adjacent = [value / factor, value * factor]
        else:
            tenth = max((high - low) / 10, 1 if self.is_integer else 0)
            adjacent = [value - tenth, value + tenth]
        rounded = [round(v) for v in adjacent] if self.is_integer else [self.round_value(v) for v in adjacent]
        return [v for v in rounded if low <= v <= high and v != value]

    def sample(self, rng: random.Random) -> Any:
        """Return a random value."""
        if self.choices:
            return rng.choice(self.choices)
        low, high = self._bounds
        if self.log:
            value = math.exp(rng.uniform(math.log(low), math.log(high)))
            return round(value) if self.is_integer else self.round_value(value)
        if self.count < math.inf:
            return self._value_at(rng.randrange(int(self.count)))
        return self.round_value(rng.uniform(low, high))

    def encode(self, params: Params) -> list[float]:
        """Return the value in `params` as features: a number scaled to 0 to 1, or a one-hot vector of the choices.

        An inactive parameter is all zeros.
        """
        value = params.get(self.key)
        if self.choices and not self._has_numeric_choices:
            return [float(self.key in params and value == choice) for choice in self.choices]
        if self.key not in params or value is None:
            return [0.0]
        ends = (min(self.choices), max(self.choices)) if self.choices else (self.low or 0, self.high or 0)
        low, high, at = (math.log(x) if self.log else float(x) for x in (*ends, value))
        return [(at - low) / (high - low) if high > low else 0.0]

    @property
    def count(self) -> float:
        """Return the number of values; infinity for a continuous range."""
        if self.choices:
            return len(self.choices)
        step = self.step or (1 if self.is_integer else 0)
        return math.floor(((self.high or 0) - (self.low or 0)) / step + 1e-9) + 1 if step else math.inf

    @property
    def values(self) -> tuple[Any, ...]:
        """Return all values; `count` must be finite."""
        return self.choices or tuple(map(self._value_at, range(int(self.count))))

    @property
    def _has_numeric_choices(self) -> bool:
        return all(isinstance(c, (int, float)) and not isinstance(c, bool) for c in self.choices)

    @property
    def _bounds(self) -> tuple[Any, Any]:
        """Return low and high in one type: 1 and 1.0 are equal but would have different digests."""
        kind = int if self.is_integer else float
        return kind(self.low or 0), kind(self.high or 0)

    def _value_at(self, index: int) -> Any:
        """Return the value after `index` steps; a negative index counts from the end."""
        (low, high), step = self._bounds, self.step or 1
        value = low + (index if index >= 0 else int(self.count) + index) * step
        if self.is_integer:
            return value
        return min(max(float(f"{value:.15g}"), low), high)  # 0.3, not 0.30000000000000004

    def _step_index(self, value: float) -> int:
        """Return the number of steps from `low` to `value`."""
        return round((value - (self.low or 0)) / (self.step or 1))


def _is_number(value: Any) -> TypeGuard[float]:
    """Return True for finite numbers; YAML also has booleans, `.nan` and `.inf`."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
