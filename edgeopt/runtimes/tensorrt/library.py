"""Load TensorRT's Python module and collect its log messages."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from edgeopt.errors import BuildError

STRONGLY_TYPED_ONLY = (11, 0)
"""First TensorRT version that supports only strongly typed networks."""

TensorRtModule = Any
"""The module `tensorrt`. It has no type stubs; a test checks every name that edgeopt uses against its bindings."""


@cache
def installed_version() -> str:
    """Return the version of TensorRT, or an empty string if it cannot be loaded."""
    try:
        return str(load().__version__)
    except BuildError:
        return ""


def load() -> TensorRtModule:
    """Import the module `tensorrt`. Raise BuildError if it or one of its shared libraries is missing."""
    try:
        return import_module("tensorrt")
    except ImportError as error:
        raise BuildError(
            f"TensorRT cannot be imported ({error})", hint="Install it with `pip install 'edgeopt[tensorrt]'`"
        ) from error


def make_logger(trt: TensorRtModule, messages: list[str]) -> Any:
    """Return a TensorRT logger that appends errors and warnings to `messages`."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING):
                messages.append(message)

    return Logger()
