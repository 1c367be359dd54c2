"""Tensors in files: safetensors alone, which hold nothing that runs."""

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
    """Tensors as one file."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of one file. Raises InputError where it is corrupt or truncated."""
    from safetensors.torch import load_file

    return _read(load_file, path)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The same as arrays, where torch is not to be imported."""
    from safetensors.numpy import load_file

    return _read(load_file, path)


def read_folder(directory: Path) -> dict[str, Tensor]:
    """All tensors of a folder's files. Raises InputError where one is corrupt or truncated."""
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
