"""Quantize a float GGUF file to llama.cpp's own types with llama.cpp's quantizer."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path

import llama_cpp
import numpy as np

from edgeopt.errors import BuildError
from edgeopt.runtimes.llamacpp import library


def quantize(source: Path, path: Path, file_type: str, importance: Mapping[str, np.ndarray]) -> None:
    """Quantize the GGUF file `source` to `file_type`, such as Q4_K_M, and write it to `path`.

    Args:
        importance: E[x²] of each input channel, float32, by tensor name; empty to weight all channels equally.

    Raises:
        BuildError: llama.cpp fails.
    """
    library.silence()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{file_type}")
    if importance:
        params.imatrix = _importance_matrix(importance)
    if llama_cpp.llama_model_quantize(bytes(source), bytes(path), ctypes.byref(params)) != 0:
        raise BuildError(
            f"llama.cpp failed to quantize the model to {file_type}", hint="Use another file type or the step int4"
        )


def _importance_matrix(importance: Mapping[str, np.ndarray]) -> ctypes.Array[llama_cpp.llama_model_imatrix_data]:
    """Return llama.cpp's importance matrix: one entry per tensor and an empty last one.

    The entries point into the arrays of `importance`, which must outlive them.
    """
    entries: ctypes.Array[llama_cpp.llama_model_imatrix_data] = (
        llama_cpp.llama_model_imatrix_data * (len(importance) + 1)
    )()
    for entry, (name, second_moments) in zip(entries, importance.items(), strict=False):
        entry.name, entry.size = name.encode(), second_moments.size
        entry.data = second_moments.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return entries
