"""Call onnxruntime-genai through its C API.

The Python API passes tokens as numpy arrays. Importing numpy would cost a serving process 15 MiB of memory and a
seventh of its startup time. Specification: onnxruntime-genai, src/ort_genai_c.h.
"""

from __future__ import annotations

import ctypes
import json
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from ctypes import POINTER, byref, c_bool, c_char_p, c_double, c_int32, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.runtimes.onnxruntime_common.thread_affinity import ThreadPinning

_ARGUMENT_TYPES: Mapping[str, tuple[Any, ...]] = {
    "OgaCreateConfig": (c_char_p, POINTER(c_void_p)),
    "OgaConfigOverlay": (c_void_p, c_char_p),
    "OgaCreateModelFromConfig": (c_void_p, POINTER(c_void_p)),
    "OgaCreateGeneratorParams": (c_void_p, POINTER(c_void_p)),
    "OgaGeneratorParamsSetSearchNumber": (c_void_p, c_char_p, c_double),
    "OgaGeneratorParamsSetSearchBool": (c_void_p, c_char_p, c_bool),
    "OgaCreateGenerator": (c_void_p, c_void_p, POINTER(c_void_p)),
    "OgaGenerator_AppendTokens": (c_void_p, POINTER(c_int32), c_size_t),
    "OgaGenerator_GenerateNextToken": (c_void_p,),
    "OgaGenerator_RewindTo": (c_void_p, c_size_t),
    "OgaGenerator_GetNextTokens": (c_void_p, POINTER(POINTER(c_int32)), POINTER(c_size_t)),
    "OgaGenerator_GetOutput": (c_void_p, c_char_p, POINTER(c_void_p)),
    "OgaCreateAdapters": (c_void_p, POINTER(c_void_p)),
    "OgaLoadAdapter": (c_void_p, c_char_p, c_char_p),
    "OgaSetActiveAdapter": (c_void_p, c_void_p, c_char_p),
    "OgaTensorGetShapeRank": (c_void_p, POINTER(c_size_t)),
    "OgaTensorGetShape": (c_void_p, POINTER(c_int64), c_size_t),
    "OgaTensorGetData": (c_void_p, POINTER(c_void_p)),
}
"""Argument types of the functions that return an OgaResult, which is null on success."""


@cache
def _library() -> ctypes.CDLL:
    import onnxruntime_genai  # also finds and loads ONNX Runtime

    library = ctypes.CDLL(str(Path(onnxruntime_genai.__file__).with_name("libonnxruntime-genai.so")))
    for name, argument_types in _ARGUMENT_TYPES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = argument_types, c_void_p
    library.OgaResultGetError.argtypes, library.OgaResultGetError.restype = (c_void_p,), c_char_p
    return library


def _call(name: str, *arguments: Any) -> None:
    """Call a function of the library. Raises RuntimeError with the library's message if it fails."""
    library = _library()
    result = getattr(library, name)(*arguments)
    if result:
        message = library.OgaResultGetError(result).decode(errors="replace")
        library.OgaDestroyResult(c_void_p(result))
        raise RuntimeError(message)


class _Object:
    """An object of the library. It is destroyed with this one."""

    def __init__(self, kind: str, create: str, *arguments: Any) -> None:
        self.handle = c_void_p()
        _call(create, *arguments, byref(self.handle))
        weakref.finalize(self, getattr(_library(), f"OgaDestroy{kind}"), self.handle)


class Model(_Object):
    """The engine in `directory`, with `settings` overlaid on its genai_config.json."""

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        config = _Object("Config", "OgaCreateConfig", str(directory).encode())
        _call("OgaConfigOverlay", config.handle, json.dumps(settings).encode())
        super().__init__("Model", "OgaCreateModelFromConfig", config.handle)


class Adapters(_Object):
    """Adapters of a model. Each is loaded from its file once."""

    def __init__(self, model: Model) -> None:
        super().__init__("Adapters", "OgaCreateAdapters", model.handle)
        self._loaded: set[str] = set()

    def load(self, name: str, path: Path) -> None:
        """Load the adapter at `path` unless it is loaded."""
        if name not in self._loaded:
            _call("OgaLoadAdapter", self.handle, str(path).encode(), name.encode())
            self._loaded.add(name)


class Generator(_Object):
    """Greedy decoding of one sequence.

    Args:
        max_length: capacity of the key-value cache in tokens, prompt included.
        min_length: tokens, prompt included, before which no end token is generated.
        pin_thread: create the context in which this thread computes.
    """

    def __init__(
        self, model: Model, *, max_length: int, min_length: int, pin_thread: ThreadPinning = nullcontext
    ) -> None:
        self._pin_thread = pin_thread
        parameters = _Object("GeneratorParams", "OgaCreateGeneratorParams", model.handle)
        for name, value in {"max_length": max_length, "min_length": min_length}.items():
            _call("OgaGeneratorParamsSetSearchNumber", parameters.handle, name.encode(), value)
        _call("OgaGeneratorParamsSetSearchBool", parameters.handle, b"do_sample", False)
        super().__init__("Generator", "OgaCreateGenerator", model.handle, parameters.handle)

    def set_active_adapter(self, adapters: Adapters, name: str) -> None:
        """Compute with a loaded adapter from now on."""
        _call("OgaSetActiveAdapter", self.handle, adapters.handle, name.encode())

    def append_tokens(self, tokens: Sequence[int]) -> None:
        """Append tokens to the sequence and compute them."""
        with self._pin_thread():
            _call("OgaGenerator_AppendTokens", self.handle, (c_int32 * len(tokens))(*tokens), len(tokens))

    def generate_next_token(self) -> int:
        """Return the next token and append it to the sequence."""
        tokens, count = POINTER(c_int32)(), c_size_t()
        with self._pin_thread():
            _call("OgaGenerator_GenerateNextToken", self.handle)
        _call("OgaGenerator_GetNextTokens", self.handle, byref(tokens), byref(count))
        return int(tokens[0])

    def rewind_to(self, length: int) -> None:
        """Remove all but the first `length` tokens."""
        _call("OgaGenerator_RewindTo", self.handle, length)

    def get_output(self, name: str) -> np.ndarray:
        """Return a copy of a float32 output of the last run."""
        import numpy as np

        tensor = _Object("Tensor", "OgaGenerator_GetOutput", self.handle, name.encode())
        rank, data = c_size_t(), c_void_p()
        _call("OgaTensorGetShapeRank", tensor.handle, byref(rank))
        shape = (c_int64 * rank.value)()
        _call("OgaTensorGetShape", tensor.handle, shape, rank)
        _call("OgaTensorGetData", tensor.handle, byref(data))
        pointer = ctypes.cast(data, POINTER(ctypes.c_float))
        array: np.ndarray = np.ctypeslib.as_array(pointer, shape=tuple(shape)).copy()
        return array
