"""A model in a local folder in Hugging Face layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgeopt.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalFolder:
    """`config.json`, `*.safetensors` and `tokenizer.json` in one folder."""

    path: str

    def locate(self) -> Path:
        folder = Path(self.path).expanduser()
        if not folder.is_dir():
            raise InputError("no such folder", location=f"model.path={self.path}", hint="Give the folder of a model")
        return folder.resolve()
