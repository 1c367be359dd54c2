"""Look up the versions of installed libraries that affect compressed models, engines and measurements."""

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
"""Libraries that affect the content of an engine."""


@cache
def versions() -> dict[str, str]:
    """Return the installed versions of `TRACKED_LIBRARIES`."""
    return installed(TRACKED_LIBRARIES)


def distribution(module: str) -> str:
    """Return the distribution name of the library with the top-level module `module`."""
    return "llama-cpp-python" if module == "llama_cpp" else module.replace("_", "-")


def installed(names: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of the libraries in `names`, without those that are not installed."""
    installed_versions = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed_versions[name] = metadata.version(name)
    return installed_versions
