"""A GGUF file in float as one in llama.cpp's own types, rounded by llama.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path

import llama_cpp
import numpy as np

from edgeopt.errors import BuildError
from edgeopt.runtimes.llamacpp import library


def rounded(source: Path, path: Path, file_type: str, importance: Mapping[str, np.ndarray]) -> None:
    """Write `source` as `path` in a file type such as Q4_K_M. Raises BuildError.

    Args:
        importance: mean x² of each input channel, float32, by the name of the tensor that multiplies them; empty where
            all weigh the same.
    """
    library.silence()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{file_type}")
    if importance:
        params.imatrix = _matrix(importance)
    if llama_cpp.llama_model_quantize(bytes(source), bytes(path), ctypes.byref(params)) != 0:
        raise BuildError(f"llama.cpp could not round the model to {file_type}", hint="Use another type, or int4")


def _matrix(importance: Mapping[str, np.ndarray]) -> ctypes.Array[llama_cpp.llama_model_imatrix_data]:
    """Entries that end with an empty one. They point into the arrays, which have to outlive them."""
    entries: ctypes.Array[llama_cpp.llama_model_imatrix_data] = (
        llama_cpp.llama_model_imatrix_data * (len(importance) + 1)
    )()
    for entry, (name, energy) in zip(entries, importance.items(), strict=False):
        entry.name, entry.size = name.encode(), energy.size
        entry.data = energy.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return entries
