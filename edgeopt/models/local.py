"""Use a model in a local folder in Hugging Face layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgeopt.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalFolder:
    """Model in the folder `path` with `config.json`, `*.safetensors` and `tokenizer.json`."""

    path: str

    def locate(self) -> Path:
        """Return the absolute path of the folder. Raises InputError if it does not exist."""
        folder = Path(self.path).expanduser()
        if not folder.is_dir():
            raise InputError(
                "the folder does not exist",
                location=f"model.path={self.path}",
                hint="Set model.path to a model's folder",
            )
        return folder.resolve()
