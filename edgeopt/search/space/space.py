"""A search space from a sweep file: parameters named by the config keys that they override."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeopt.errors import ConfigError
from edgeopt.search.space.parameter import Parameter, Params

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.distributions import BaseDistribution

_PLAIN = re.compile(r"[A-Za-z_][\w./-]*")
_NOT_TEXT = ("null", "true", "false", "nan", "inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Parameters in the order in which they are decided."""

    parameters: tuple[Parameter, ...]

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Space:
        parameters = tuple(Parameter.parse(key, entry) for key, entry in data.items())
        if not parameters:
            raise ConfigError(
                "there is nothing to search", location="search.parameters", hint="List at least one parameter"
            )
        known: set[str] = set()
        for parameter in parameters:
            later = sorted(set(parameter.when) - known)
            if later:
                raise ConfigError(
                    f"it depends on {later[0]!r}, which is not listed before it",
                    location=f"search.parameters.{parameter.key}.when",
                    hint=f"Move {later[0]} above {parameter.key}",
                )
            known.add(parameter.key)
        return cls(parameters=parameters)

    def require(self, params: Params) -> None:
        """ConfigError where `params` is no recipe of this space."""
        for parameter in self.parameters:
            if parameter.exists(params) != (parameter.key in params) or not (
                parameter.key not in params or parameter.holds(params[parameter.key])
            ):
                given = params.get(parameter.key, "nothing")
                raise ConfigError(
                    f"{given!r} for {parameter.key} is not in the space",
                    location="search.enqueue",
                    hint=f"Add it to search.parameters.{parameter.key}, or enqueue another recipe",
                )
        unknown = sorted(params.keys() - {p.key for p in self.parameters})
        if unknown:
            raise ConfigError(
                f"{unknown[0]!r} is no parameter", location="search.enqueue", hint="List it in search.parameters"
            )

    def normal(self, params: Mapping[str, Any]) -> Params:
        """A recipe of this space in its order and as it would propose it, so that the same recipe is one recipe."""
        return {p.key: p.normal(params[p.key]) for p in self.parameters if p.key in params}

    def examples(self) -> list[Params]:
        """A recipe for every choice and every end of a range, so that each can be tried before a search."""
        return [self._with(parameter, value) for parameter in self.parameters for value in parameter.ends]

    def _with(self, wanted: Parameter, value: Any) -> Params:
        needed: Params = {wanted.key: value}
        for parameter in reversed(self.parameters):  # what a parameter depends on stands before it
            if parameter.key in needed:
                needed |= {key: values[0] for key, values in parameter.when.items()}
        params: Params = {}
        for parameter in self.parameters:
            if parameter.exists(params):
                params[parameter.key] = needed.get(parameter.key, parameter.ends[0])
        return params

    def places(self, params: Params) -> list[float]:
        """Where a recipe stands: the places of all parameters, one after another."""
        return [place for parameter in self.parameters for place in parameter.places(params)]

    def distributions(self, params: Params) -> dict[str, BaseDistribution]:
        """Of the parameters that `params` has, as Optuna sees them."""
        return {p.key: p.distribution for p in self.parameters if p.key in params}

    def every(self, limit: int) -> Iterator[Params] | None:
        """All recipes, or None where there are more than `limit`."""
        found: list[Params] = [{}]
        for parameter in self.parameters:
            grown: list[Params] = []
            for params in found:
                if not parameter.exists(params):
                    grown.append(params)
                elif len(grown) + parameter.count > limit:
                    return None
                else:
                    grown += [{**params, parameter.key: value} for value in parameter.values]
            found = grown
            if len(found) > limit:
                return None
        return iter(found)

    def draw(self, chance: random.Random) -> Params:
        """A recipe at random."""
        params: Params = {}
        for parameter in self.parameters:
            if parameter.exists(params):
                params[parameter.key] = parameter.draw(chance)
        return params

    def neighbours(self, params: Params, chance: random.Random) -> Iterator[Params]:
        """Recipes that differ from `params` in one value, and in what a parameter needs that exists only then."""
        for parameter in self.parameters:
            if parameter.key in params:
                for value in parameter.neighbours(params[parameter.key]):
                    changed: Params = {}
                    for other in self.parameters:
                        if other.key == parameter.key:
                            changed[other.key] = value
                        elif other.exists(changed):
                            changed[other.key] = params[other.key] if other.key in params else other.draw(chance)
                    yield changed

    def suggest(self, trial: Trial) -> Params:
        """The values of every parameter that exists, given those decided before it."""
        params: Params = {}
        for parameter in self.parameters:
            if parameter.exists(params):
                params[parameter.key] = parameter.suggest(trial)
        return params


def overrides(params: Params) -> list[str]:
    """Parameters as Hydra overrides, in the space's order."""
    return [f"{key}={_written(value)}" for key, value in params.items()]


def _written(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, str) and (not _PLAIN.fullmatch(value) or value.lower() in _NOT_TEXT):
        escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
        return f"'{escaped}'"
    return str(value).lower() if isinstance(value, bool) else str(value)
