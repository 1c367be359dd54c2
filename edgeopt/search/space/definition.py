"""What a sweep file says under `search`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from edgeopt.core import units
from edgeopt.errors import ConfigError
from edgeopt.search.space.space import Space


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """A search: what is varied, what is wanted, how proposals are made and when it ends.

    Attributes:
        objectives: direction by metric; null takes one away.
        enqueue: recipes known to be good, tried first.
        sampler: who proposes, once the spread has been tried; `surrogate` models what the choices do.
        spread: recipes that the estimate finds best at first, spread along its front.
        refine: share of `trials` that is left for neighbours of the front's members.
        trials: evaluated trials, failed ones included and refused ones not, after which the search ends.
        time, energy: what may be spent before no further trial begins, such as `2 h` and `50 kJ`; None sets no end.
        stagnation: trials in a row by which the front may fail to grow before the search ends; None sets no end.
        trial_timeout_s: a trial that takes longer is ended and recorded as failed.
        lease_s: a worker that gives no sign of life for so long has lost its trial to the others.
        engine: who starts the workers: this machine, or a Ray cluster, which measures on the device's nodes alone.
    """

    study: str
    objectives: Mapping[str, str | None]
    parameters: Mapping[str, Any]
    enqueue: tuple[Mapping[str, Any], ...] = ()
    sampler: Literal["surrogate", "tpe", "nsga2", "gp", "random"] = "surrogate"
    seed: int = 0
    spread: int = 4
    refine: float = 0.25
    trials: int = 24
    time: str | None = None
    energy: str | None = None
    stagnation: int | None = None
    trial_timeout_s: float = 900.0
    lease_s: float = 60.0
    engine: Literal["local", "ray"] = "local"

    def __post_init__(self) -> None:
        if not self.study or "/" in self.study:
            raise ConfigError(f"{self.study!r} is no name", location="study", hint="Give a name without slashes")
        for name, least in (("trials", 1), ("spread", 0), ("refine", 0), ("stagnation", 1)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ConfigError(f"{value} is too few", location=name, hint=f"Give {least} or more")
        if self.refine > 1:
            raise ConfigError(f"{self.refine} is no share", location="refine", hint="Give 0 to 1")
        for name in ("trial_timeout_s", "lease_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{getattr(self, name)} s is no time", location=name, hint="Give more than 0")
        for name, limit in (("time", self.time_s), ("energy", self.energy_j)):
            if limit is not None and not limit > 0:
                raise ConfigError(f"{getattr(self, name)!r} allows no trial", location=name, hint="Give more than 0")
        if not self.directions:
            raise ConfigError(
                "there is no objective", location="objectives", hint="Give at least one metric and its direction"
            )
        space = self.space
        for params in self.enqueue:
            space.require(dict(params))

    @property
    def space(self) -> Space:
        return Space.parse(self.parameters)

    @property
    def directions(self) -> dict[str, str]:
        """The objectives that were not taken away."""
        return {metric: direction for metric, direction in self.objectives.items() if direction is not None}

    @property
    def time_s(self) -> float | None:
        return None if self.time is None else _parsed(self.time, "s", "time")

    @property
    def energy_j(self) -> float | None:
        return None if self.energy is None else _parsed(self.energy, "J", "energy")


def _parsed(text: str, unit: str, location: str) -> float:
    try:
        return units.parse(text, unit)
    except ConfigError as error:
        raise error.at(location) from error
