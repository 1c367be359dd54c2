"""What calibration text does inside a network: statistics gathered by forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from edgeopt.checkpoints import tokenizer
from edgeopt.checkpoints.modeling import layers, norms, units
from edgeopt.core.model_spec import EMBEDDING

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.corpus import Text


def calibration_windows(checkpoint: Checkpoint, text: Text, *, count: int, length: int) -> list[list[int]]:
    """The first `count` windows of calibration text, capped at the model's context."""
    return tokenizer.windows(
        text, checkpoint.directory, length=min(length, checkpoint.spec.context_length), limit=count
    )


def input_sum_of_squares(
    network: PreTrainedModel, windows: Sequence[Sequence[int]], pick: Callable[[Any], Any]
) -> list[Tensor]:
    """For each layer the sum over tokens of x², per input channel of the linear map that `pick` names.

    Returns one float64 tensor of shape (in_features,) a layer; its square root is the activation norm
    of Wanda (arXiv 2306.11695).
    """
    picked = {str(number): pick(layer) for number, layer in enumerate(layers(network))}
    return list(_energies(network, windows, picked).values())


def unit_second_moments(network: PreTrainedModel, windows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Mean of x² over tokens, per input channel of each unit but the embedding, float64, shape (columns,)."""
    first = {unit: network.get_submodule(names[0]) for unit, names in units(network).items() if unit != EMBEDDING}
    count = sum(map(len, windows))
    return {unit: energy / count for unit, energy in _energies(network, windows, first).items()}


def _energies(
    network: PreTrainedModel, windows: Sequence[Sequence[int]], linear: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The sum over tokens of x², per input channel of each of these linear maps, float64, shape (in_features,)."""
    import torch

    energies = {name: torch.zeros(module.in_features, dtype=torch.float64) for name, module in linear.items()}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            energies[name] += inputs[0].detach().double().square().sum(dim=(0, 1))

        return add

    with _removed([module.register_forward_pre_hook(watch(name)) for name, module in linear.items()]):
        run(network, windows)
    return energies


def norm_sum_of_squares(network: PreTrainedModel, windows: Sequence[Sequence[int]]) -> Tensor:
    """For each hidden channel the sum over tokens and norms of x² after the norm, float64, shape (hidden,)."""
    import torch

    energy = torch.zeros(network.get_input_embeddings().weight.shape[1], dtype=torch.float64)

    def add(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        energy.add_(output.detach().double().square().sum(dim=(0, 1)))

    with _removed([norm.register_forward_hook(add) for norm in norms(network)]):
        run(network, windows)
    return energy


def block_influence(network: PreTrainedModel, windows: Sequence[Sequence[int]]) -> list[float]:
    """1 - mean cosine similarity of a layer's input and output (ShortGPT, arXiv 2403.03853), one a layer."""
    import torch
    from torch.nn.functional import cosine_similarity

    sums = [0.0] * len(layers(network))
    count = 0

    def watch(number: int) -> Callable[..., None]:
        def add(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: object) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            assert isinstance(after, torch.Tensor)
            sums[number] += cosine_similarity(before.double(), after.double(), dim=-1).sum().item()

        return add

    handles = [layer.register_forward_hook(watch(n), with_kwargs=True) for n, layer in enumerate(layers(network))]
    with _removed(handles):
        run(network, windows)
    count = sum(map(len, windows))
    return [1.0 - total / count for total in sums]


def run(network: PreTrainedModel, windows: Sequence[Sequence[int]]) -> None:
    """Forward passes for their side effects on hooks."""
    import torch

    with torch.inference_mode():
        for window in windows:
            network(torch.tensor([list(window)]), use_cache=False)


@contextmanager
def _removed(handles: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
