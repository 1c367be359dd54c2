"""Define the `search` section of a sweep file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from edgeopt.core import units
from edgeopt.errors import ConfigError
from edgeopt.search.space.search_space import SearchSpace


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """A search: objectives, search space, sampler and budget.

    Attributes:
        study: name of the study.
        objectives: direction (`minimize` or `maximize`) by metric; null removes an objective.
        parameters: searched parameters by config key, see `Parameter`.
        enqueue: recipes to try first.
        sampler: proposes recipes after the initial spread; `surrogate` is edgeopt's own, the others are Optuna's.
        seed: seed of all samplers.
        spread: number of initial recipes, spread along the front of the predictions.
        refine: share of `trials` reserved for neighbours of the front.
        trials: budget of evaluated trials. Failed trials count, refused trials do not.
        time: total time after which no trial starts, such as `2 h`; None for no limit.
        energy: total energy after which no trial starts, such as `50 kJ`; None for no limit.
        stagnation: number of consecutive trials without growth of the front after which the search ends; None for no
            limit.
        trial_timeout_s: seconds after which a trial is stopped and recorded as failed.
        lease_s: seconds without a heartbeat after which another worker takes over the trials of a worker.
        engine: starts the workers: `local` on this machine, or `ray` on a cluster whose device nodes measure.
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
            raise ConfigError(f"`study` must be a name without slashes, got {self.study!r}", location="study")
        for name, minimum in (("trials", 1), ("spread", 0), ("refine", 0), ("stagnation", 1)):
            value = getattr(self, name)
            if value is not None and not value >= minimum:
                raise ConfigError(f"`{name}` must be at least {minimum}, got {value}", location=name)
        if self.refine > 1:
            raise ConfigError(f"`refine` must be between 0 and 1, got {self.refine}", location="refine")
        for name in ("trial_timeout_s", "lease_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"`{name}` must be above 0, got {getattr(self, name)}", location=name)
        for name, limit in (("time", self.time_s), ("energy", self.energy_j)):
            if limit is not None and not limit > 0:
                raise ConfigError(f"`{name}` must be above 0, got {getattr(self, name)!r}", location=name)
        if not self.directions:
            raise ConfigError("`objectives` must set the direction of at least one metric", location="objectives")
        space = self.space
        for params in self.enqueue:
            space.validate(dict(params))

    @property
    def space(self) -> SearchSpace:
        """Return the search space."""
        return SearchSpace.parse(self.parameters)

    @property
    def directions(self) -> dict[str, str]:
        """Return the direction of every objective that is not null."""
        return {metric: direction for metric, direction in self.objectives.items() if direction is not None}

    @property
    def time_s(self) -> float | None:
        """Return the time budget in seconds."""
        return None if self.time is None else _parse(self.time, "s", "time")

    @property
    def energy_j(self) -> float | None:
        """Return the energy budget in joules."""
        return None if self.energy is None else _parse(self.energy, "J", "energy")


def _parse(text: str, unit: str, location: str) -> float:
    try:
        return units.parse(text, unit)
    except ConfigError as error:
        raise error.at(location) from error
