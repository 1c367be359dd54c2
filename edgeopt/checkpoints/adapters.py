"""Read, write and apply adapters that are not merged into the weights, one safetensors file per adapter.

Compression trains adapters, checkpoints store them, and runtimes let each request select one. An adapter adds
up · down · x to the output of each of its matrices (LoRA, arXiv 2106.09685).
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
    """Low-rank update of a matrix of shape (rows, columns).

    Attributes:
        down: float32, shape (rank, columns).
        up: float32, shape (rows, rank). The scale of the update is included.
    """

    down: Tensor
    up: Tensor

    @property
    def weight(self) -> Tensor:
        """Return the update as a dense matrix, float32, shape (rows, columns)."""
        return self.up @ self.down


def write(updates: Mapping[str, LowRankUpdate], directory: Path, name: str) -> None:
    """Write `updates` by module name into a checkpoint folder, as the adapter `name`."""
    (directory / FOLDER).mkdir(exist_ok=True)
    downs = {factor_names(module)[0]: update.down for module, update in updates.items()}
    ups = {factor_names(module)[1]: update.up for module, update in updates.items()}
    safetensors_io.write(downs | ups, directory / adapter_path(name))


def read(directory: Path, name: str) -> dict[str, LowRankUpdate]:
    """Read the updates of the adapter `name` by module name. Raises InputError if its file is missing or corrupt."""
    tensors = safetensors_io.read(directory / adapter_path(name))
    modules = [key.removesuffix(f".{_DOWN}") for key in tensors if key.endswith(f".{_DOWN}")]
    factors = {module: [tensors[factor] for factor in factor_names(module)] for module in modules}
    return {module: LowRankUpdate(down=down, up=up) for module, (down, up) in factors.items()}


def read_arrays(directory: Path, name: str) -> dict[str, np.ndarray]:
    """Read the factors of the adapter `name` by factor name, without importing torch. Raises the errors of `read`."""
    return safetensors_io.read_arrays(directory / adapter_path(name))


def adapter_path(name: str) -> Path:
    """Return the path of the adapter `name`, relative to the checkpoint folder."""
    return Path(FOLDER) / f"{name}.safetensors"


def factor_names(module: str) -> tuple[str, str]:
    """Return the names of a module's factors: down of shape (rank, columns) and up of shape (rows, rank)."""
    return f"{module}.{_DOWN}", f"{module}.{_UP}"


@contextmanager
def attached(network: nn.Module, updates: Mapping[str, LowRankUpdate]) -> Iterator[None]:
    """Apply `updates` to the outputs of their modules inside the block. The weights are not modified."""
    handles = [
        network.get_submodule(name).register_forward_hook(_make_hook(update)) for name, update in updates.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _make_hook(update: LowRankUpdate) -> Callable[..., Tensor]:
    def add_update(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return output + inputs[0] @ update.down.T @ update.up.T

    return add_update


def require(adapter: str | None, spec: ModelSpec, location: str = "adapter") -> None:
    """Raise ConfigError if `spec` does not contain `adapter`. None, for the base model, is always valid."""
    if adapter is not None and adapter not in spec.adapters:
        known = ", ".join(spec.adapters)
        raise ConfigError(
            f"the adapter must be one of {known}; got {adapter!r}"
            if known
            else f"this engine was built without adapters, got {adapter!r}",
            location=location,
            hint="" if known else "Omit the adapter",
        )
