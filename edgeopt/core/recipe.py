"""Represent a recipe as plain data: a model, ordered compression steps and a runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edgeopt.core.config_objects import digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Model, compression steps and runtime of a trial.

    Attributes:
        model: config of the model source (see `edgeopt.core.config_objects`).
        steps: (name, config) of each step in order of application.
        runtime: config of the runtime.
    """

    model: Mapping[str, Any]
    steps: tuple[tuple[str, Mapping[str, Any]], ...]
    runtime: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Return a digest that ignores the names of the steps."""
        return digest([self.model, [step for _, step in self.steps], self.runtime])

    def summary(self) -> dict[str, Any]:
        """Return text, digest and configs, as stored in a result."""
        return {"text": str(self), "digest": self.digest, **asdict(self)}

    def uncompressed(self, runtime: Mapping[str, Any]) -> Recipe:
        """Return the recipe of the uncompressed model on `runtime`."""
        return Recipe(model=self.model, steps=(), runtime=runtime)

    def __str__(self) -> str:
        return " → ".join(name for name, _ in self.steps) or "no compression"


def label(params: Mapping[str, Any]) -> str:
    """Format searched parameters: the name of the recipe, then `key=value` with the last part of each key."""
    recipe = [str(params["recipe"])] if "recipe" in params else []
    return " ".join([*recipe, *(f"{k.rpartition('.')[2]}={v}" for k, v in params.items() if k != "recipe")])
