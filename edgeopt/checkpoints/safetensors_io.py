"""Read and write tensors as safetensors, a format that cannot contain code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from edgeopt.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

T = TypeVar("T")


def write(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors into one file."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def read(path: Path) -> dict[str, Tensor]:
    """Read the tensors of one file. Raises InputError if it is missing, corrupt or truncated."""
    from safetensors.torch import load_file

    return _read(load_file, path)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read the tensors of one file as NumPy arrays, without importing torch. Raises the errors of `read`."""
    from safetensors.numpy import load_file

    return _read(load_file, path)


def read_folder(directory: Path) -> dict[str, Tensor]:
    """Read the tensors of all safetensors files in a folder. Raises InputError if a file is corrupt or truncated."""
    state: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        state |= read(path)
    return state


def _read(load_file: Callable[[Path], dict[str, T]], path: Path) -> dict[str, T]:
    from safetensors import SafetensorError

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"the weights cannot be read ({error})", location=str(path), hint="Download or copy the file again"
        ) from error
