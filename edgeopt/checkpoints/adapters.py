"""Adapters that are not merged: low-rank updates of a checkpoint's matrices, in a file for each beside the weights.

Compression trains them, checkpoints carry them, and runtimes let each request choose one: all add up · down · x to
what a matrix computes (LoRA, arXiv 2106.09685).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.checkpoints import safetensors_io
from edgeopt.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from edgeopt.core.model_spec import ModelSpec

FOLDER = "adapters"
_DOWN, _UP = "lora_A", "lora_B"


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankUpdate:
    """An update of a matrix of shape (rows, columns).

    Attributes:
        down: float32, shape (rank, columns).
        up: float32, shape (rows, rank); the scale of the update is multiplied in.
    """

    down: Tensor
    up: Tensor

    @property
    def weight(self) -> Tensor:
        """float32, shape (rows, columns)."""
        return self.up @ self.down


def write(updates: Mapping[str, LowRankUpdate], directory: Path, name: str) -> None:
    """Keep the adapter `name`, its updates by the names of their modules, in a checkpoint's folder."""
    (directory / FOLDER).mkdir(exist_ok=True)
    downs = {names(module)[0]: update.down for module, update in updates.items()}
    ups = {names(module)[1]: update.up for module, update in updates.items()}
    safetensors_io.write(downs | ups, directory / path_of(name))


def read(directory: Path, name: str) -> dict[str, LowRankUpdate]:
    """The updates of the adapter `name` by module. Raises InputError where its file is corrupt or missing."""
    tensors = safetensors_io.read(directory / path_of(name))
    modules = [key.removesuffix(f".{_DOWN}") for key in tensors if key.endswith(f".{_DOWN}")]
    factors = {module: [tensors[factor] for factor in names(module)] for module in modules}
    return {module: LowRankUpdate(down=down, up=up) for module, (down, up) in factors.items()}


def arrays(directory: Path, name: str) -> dict[str, np.ndarray]:
    """The factors of the adapter `name` as its file names them, without torch: see `names`."""
    return safetensors_io.read_arrays(directory / path_of(name))


def path_of(name: str) -> Path:
    """Where the adapter `name` lies in the folder of a checkpoint."""
    return Path(FOLDER) / f"{name}.safetensors"


def names(module: str) -> tuple[str, str]:
    """What a module's factors are called, (rank, columns) and (rows, rank)."""
    return f"{module}.{_DOWN}", f"{module}.{_UP}"


@contextmanager
def attached(network: nn.Module, updates: Mapping[str, LowRankUpdate]) -> Iterator[None]:
    """While it is entered, the modules in `updates` compute with them; the weights stay as they are."""
    handles = [network.get_submodule(name).register_forward_hook(_adding(u)) for name, u in updates.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(update: LowRankUpdate) -> Callable[..., Tensor]:
    def add(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return output + inputs[0] @ update.down.T @ update.up.T

    return add


def require(adapter: str | None, spec: ModelSpec, location: str = "adapter") -> None:
    """ConfigError where a request asks for an adapter that the engine does not have."""
    if adapter is not None and adapter not in spec.adapters:
        known = ", ".join(spec.adapters)
        raise ConfigError(
            f"this engine has no adapter {adapter!r}",
            location=location,
            hint=f"Choose one of: {known}" if known else "Name none: it was built without adapters",
        )
