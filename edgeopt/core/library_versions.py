"""Which versions of which libraries are installed: they decide what a recipe is compressed, built and measured to."""

from __future__ import annotations

import contextlib
from functools import cache
from importlib import metadata

TRACKED_LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-genai",
    "gguf",
    "llama-cpp-python",
    "tensorrt",
)


@cache
def versions() -> dict[str, str]:
    """Versions of the libraries that decide what an engine is."""
    return installed(TRACKED_LIBRARIES)


def distribution(module: str) -> str:
    """The name under which the library with this module is installed."""
    return "llama-cpp-python" if module == "llama_cpp" else module.replace("_", "-")


def installed(names: tuple[str, ...]) -> dict[str, str]:
    """Versions of those of the libraries that are there."""
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
