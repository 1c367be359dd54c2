"""Use the bundled reference model, a small trained Llama. See edgeopt/reference/README.md."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceModel:
    """Bundled model, the default of every config. It needs no download."""

    def locate(self) -> Path:
        """Return the folder inside the installed package."""
        return Path(str(files("edgeopt") / "reference"))
