"""Silence the log output of llama.cpp, which prints a line for every tensor that it loads."""

from __future__ import annotations

from typing import Any

import llama_cpp


def _ignore(level: int, text: bytes, data: Any) -> None:
    """Discard a log message."""


_IGNORE_CALLBACK = llama_cpp.llama_log_callback(_ignore)  # llama.cpp keeps only a pointer: it must stay alive


def silence() -> None:
    """Discard all further log messages of this process."""
    llama_cpp.llama_log_set(_IGNORE_CALLBACK, None)
