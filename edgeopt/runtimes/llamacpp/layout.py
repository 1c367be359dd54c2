"""Name the files inside a llama.cpp engine folder."""

from __future__ import annotations

from pathlib import Path

from edgeopt.checkpoints import adapters

MODEL_FILE = "model.gguf"


def adapter_path(adapter: str) -> Path:
    """Return the path of an adapter's file, relative to the engine folder."""
    return Path(adapters.FOLDER) / f"{adapter}.gguf"
