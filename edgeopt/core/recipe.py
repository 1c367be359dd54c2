"""Recipe: a model, ordered compression steps and a runtime, as plain data with one digest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edgeopt.core.config_objects import digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """`model`, `runtime` and each step are descriptions of parts (see edgeopt.core.config_objects).

    Attributes:
        steps: (name, description) in the order in which they are applied.
    """

    model: Mapping[str, Any]
    steps: tuple[tuple[str, Mapping[str, Any]], ...]
    runtime: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Equal for recipes that do the same, whatever their steps are called."""
        return digest([self.model, [step for _, step in self.steps], self.runtime])

    def summary(self) -> dict[str, Any]:
        """Text, digest and descriptions, as results keep them."""
        return {"text": str(self), "digest": self.digest, **asdict(self)}

    def uncompressed(self, runtime: Mapping[str, Any]) -> Recipe:
        """The same model as it is, on a runtime."""
        return Recipe(model=self.model, steps=(), runtime=runtime)

    def __str__(self) -> str:
        return " → ".join(name for name, _ in self.steps) or "no compression"


def label(params: Mapping[str, Any]) -> str:
    """Searched parameters in a few words: the recipe's name, then `key=value` with the last part of each key."""
    recipe = [str(params["recipe"])] if "recipe" in params else []
    return " ".join([*recipe, *(f"{k.rpartition('.')[2]}={v}" for k, v in params.items() if k != "recipe")])
