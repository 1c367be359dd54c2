"""llama.cpp's library, which tells each tensor that it reads."""

from __future__ import annotations

from typing import Any

import llama_cpp


def _ignore(level: int, text: bytes, data: Any) -> None:
    """Nothing is told."""


_SILENT = llama_cpp.llama_log_callback(_ignore)


def silence() -> None:
    llama_cpp.llama_log_set(_SILENT, None)
