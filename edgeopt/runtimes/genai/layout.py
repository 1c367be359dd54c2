"""Name the files inside a genai engine folder."""

from __future__ import annotations

from pathlib import Path

from edgeopt.checkpoints import adapters

GENERATION_GRAPH = "model.onnx"
"""Graph that computes the logits of the last token."""
SCORING_GRAPH = "scoring.onnx"
"""Graph that computes the logits of every token. It shares the external data of GENERATION_GRAPH."""


def adapter_path(adapter: str) -> Path:
    """Return the path of an adapter's file, relative to the engine folder."""
    return Path(adapters.FOLDER) / f"{adapter}.onnx_adapter"
