"""TensorRT's Python interface, where it is installed."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from edgeopt.errors import BuildError

STRONGLY_TYPED_ONLY = (11, 0)
"""First TensorRT version that supports only strongly typed networks."""

Trt = Any
"""The module `tensorrt`: its classes are not known to type checkers, and tests check each name that is used of it."""


@cache
def version() -> str:
    """Of the library that is here; empty where there is none that can be loaded."""
    try:
        return str(load().__version__)
    except BuildError:
        return ""


def load() -> Trt:
    """BuildError where it is not installed, or cannot be loaded without what it needs itself."""
    try:
        return import_module("tensorrt")
    except ImportError as error:
        raise BuildError(f"TensorRT cannot be loaded ({error})", hint="pip install 'edgeopt[tensorrt]'") from error


def logger(trt: Trt, told: list[str]) -> Any:
    """A logger of the library that keeps errors and warnings in `told`."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING):
                told.append(message)

    return Logger()
