"""Define a search space: parameters named by the config keys that they override."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeopt.errors import ConfigError
from edgeopt.search.space.parameter import Parameter, Params

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

_UNQUOTED = re.compile(r"[A-Za-z_][\w./-]*")
"""Strings that Hydra reads as strings without quotes."""
_KEYWORDS = ("null", "true", "false", "nan", "inf")
"""Strings that Hydra reads as another type without quotes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """Parameters in order: the condition of a parameter refers to earlier parameters only."""

    parameters: tuple[Parameter, ...]

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> SearchSpace:
        """Build the space from `search.parameters`.

        Raises ConfigError if there are no parameters, one is invalid, or a condition refers to a later parameter.
        """
        parameters = tuple(Parameter.parse(key, entry) for key, entry in data.items())
        if not parameters:
            raise ConfigError("`parameters` must list at least one parameter", location="search.parameters")
        earlier: set[str] = set()
        for parameter in parameters:
            missing = sorted(set(parameter.when) - earlier)
            if missing:
                raise ConfigError(
                    f"`when` must refer to parameters listed earlier, got {missing[0]!r}",
                    location=f"search.parameters.{parameter.key}.when",
                    hint=f"Move {missing[0]} above {parameter.key}",
                )
            earlier.add(parameter.key)
        return cls(parameters=parameters)

    def validate(self, params: Params) -> None:
        """Raise ConfigError unless `params` is a recipe of this space: exactly its active parameters, within bounds."""
        for parameter in self.parameters:
            is_given = parameter.key in params
            if parameter.is_active(params) != is_given or (is_given and not parameter.contains(params[parameter.key])):
                value = repr(params[parameter.key]) if is_given else "no value"
                raise ConfigError(
                    f"an enqueued recipe must be in the search space, got {value} for {parameter.key}",
                    location="search.enqueue",
                    hint=f"Add the value to search.parameters.{parameter.key}, or enqueue another recipe",
                )
        unknown = sorted(params.keys() - {p.key for p in self.parameters})
        if unknown:
            raise ConfigError(
                f"an enqueued recipe must set searched parameters only, got {unknown[0]!r}",
                location="search.enqueue",
                hint="Add it to search.parameters, or remove it",
            )

    def normalize(self, params: Mapping[str, Any]) -> Params:
        """Return a recipe with the order and types of proposed recipes, so that equal recipes have equal digests."""
        return {p.key: p.normalize(params[p.key]) for p in self.parameters if p.key in params}

    def examples(self) -> list[Params]:
        """Return recipes that together use every choice and both ends of every range."""
        return [self._example_with(parameter, value) for parameter in self.parameters for value in parameter.endpoints]

    def _example_with(self, chosen: Parameter, value: Any) -> Params:
        required: Params = {chosen.key: value}
        for parameter in reversed(self.parameters):  # conditions refer to earlier parameters
            if parameter.key in required:
                required |= {key: values[0] for key, values in parameter.when.items()}
        params: Params = {}
        for parameter in self.parameters:
            if parameter.is_active(params):
                params[parameter.key] = required.get(parameter.key, parameter.endpoints[0])
        return params

    def encode(self, params: Params) -> list[float]:
        """Return a recipe as a feature vector: the features of all parameters, concatenated."""
        return [feature for parameter in self.parameters for feature in parameter.encode(params)]

    def distributions(self, params: Params) -> dict[str, BaseDistribution]:
        """Return the Optuna distributions of the parameters in `params`."""
        return {p.key: p.distribution for p in self.parameters if p.key in params}

    def list_recipes(self, max_count: int) -> Iterator[Params] | None:
        """Return all recipes, or None if there are more than `max_count`."""
        recipes: list[Params] = [{}]
        for parameter in self.parameters:
            extended: list[Params] = []
            for params in recipes:
                if not parameter.is_active(params):
                    extended.append(params)
                elif len(extended) + parameter.count > max_count:
                    return None
                else:
                    extended += [{**params, parameter.key: value} for value in parameter.values]
            recipes = extended
            if len(recipes) > max_count:
                return None
        return iter(recipes)

    def sample(self, rng: random.Random) -> Params:
        """Return a random recipe."""
        params: Params = {}
        for parameter in self.parameters:
            if parameter.is_active(params):
                params[parameter.key] = parameter.sample(rng)
        return params

    def neighbours(self, params: Params, rng: random.Random) -> Iterator[Params]:
        """Yield the recipes that differ from `params` in one value.

        Parameters that this value activates get random values; those that it deactivates are removed.
        """
        for parameter in self.parameters:
            if parameter.key in params:
                for value in parameter.neighbours(params[parameter.key]):
                    changed: Params = {}
                    for other in self.parameters:
                        if other.key == parameter.key:
                            changed[other.key] = value
                        elif other.is_active(changed):
                            changed[other.key] = params[other.key] if other.key in params else other.sample(rng)
                    yield changed

    def suggest(self, trial: optuna.Trial) -> Params:
        """Return the recipe that Optuna proposes for a trial."""
        params: Params = {}
        for parameter in self.parameters:
            if parameter.is_active(params):
                params[parameter.key] = parameter.suggest(trial)
        return params


def to_overrides(params: Params) -> list[str]:
    """Return a recipe as Hydra overrides, in the order of `params`."""
    return [f"{key}={_to_override_value(value)}" for key, value in params.items()]


def _to_override_value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_to_override_value, value))}]"
    if isinstance(value, str) and (not _UNQUOTED.fullmatch(value) or value.lower() in _KEYWORDS):
        # Hydra reads a backslash literally unless a quote follows: escape those before a quote or the end
        escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value)
        return f"'{escaped}'"
    return str(value).lower() if isinstance(value, bool) else str(value)
