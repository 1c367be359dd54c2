"""The bundled reference model: trained Llama weights that need no network. See edgeopt/reference/README.md."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceModel:
    """The default model of every config."""

    def locate(self) -> Path:
        return Path(str(files("edgeopt") / "reference"))
