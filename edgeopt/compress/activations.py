"""Collect activation statistics of a network on calibration text with forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from edgeopt.checkpoints import tokenizer
from edgeopt.checkpoints.modeling import layers, norms, unit_modules
from edgeopt.core.model_spec import EMBEDDING

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from edgeopt.core.artifact import Checkpoint
    from edgeopt.core.corpus import Text


def calibration_windows(checkpoint: Checkpoint, text: Text, *, count: int, length: int) -> list[list[int]]:
    """Return the first `count` windows of token ids, each at most `length` tokens and the model's context long."""
    return tokenizer.windows(
        text, checkpoint.directory, length=min(length, checkpoint.spec.context_length), limit=count
    )


def input_sum_of_squares(
    network: PreTrainedModel, windows: Sequence[Sequence[int]], select: Callable[[Any], Any]
) -> list[Tensor]:
    """Return Σ x² over tokens for each input channel of one linear module per decoder layer.

    Its square root is the activation norm ||x|| of Wanda (arXiv 2306.11695).

    Args:
        select: returns the linear module of a decoder layer.

    Returns:
        One float64 tensor of shape (in_features,) per layer.
    """
    modules = {str(index): select(layer) for index, layer in enumerate(layers(network))}
    return list(_sums_of_squares(network, windows, modules).values())


def unit_second_moments(network: PreTrainedModel, windows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Return E[x²] per input channel of every unit except the embedding, float64, shape (columns,)."""
    modules = {
        unit: network.get_submodule(names[0]) for unit, names in unit_modules(network).items() if unit != EMBEDDING
    }
    tokens = sum(map(len, windows))
    return {unit: total / tokens for unit, total in _sums_of_squares(network, windows, modules).items()}


def _sums_of_squares(
    network: PreTrainedModel, windows: Sequence[Sequence[int]], modules: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return Σ x² over tokens per input channel of each linear module, float64, shape (in_features,)."""
    import torch

    sums = {name: torch.zeros(module.in_features, dtype=torch.float64) for name, module in modules.items()}

    def accumulate(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums[name] += inputs[0].detach().double().square().sum(dim=(0, 1))

        return hook

    with _removing([module.register_forward_pre_hook(accumulate(name)) for name, module in modules.items()]):
        run_forward(network, windows)
    return sums


def norm_sum_of_squares(network: PreTrainedModel, windows: Sequence[Sequence[int]]) -> Tensor:
    """Return Σ x² over all tokens and norm outputs for each hidden channel, float64, shape (hidden,)."""
    import torch

    total = torch.zeros(network.get_input_embeddings().weight.shape[1], dtype=torch.float64)

    def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        total.add_(output.detach().double().square().sum(dim=(0, 1)))

    with _removing([norm.register_forward_hook(hook) for norm in norms(network)]):
        run_forward(network, windows)
    return total


def block_influence(network: PreTrainedModel, windows: Sequence[Sequence[int]]) -> list[float]:
    """Return the Block Influence of every decoder layer (ShortGPT, arXiv 2403.03853).

    It is 1 - E[cos(x_in, x_out)], with the cosine similarity of a token's hidden states before and after the layer.
    """
    import torch
    from torch.nn.functional import cosine_similarity

    sums = [0.0] * len(layers(network))

    def accumulate(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: object) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            assert isinstance(after, torch.Tensor)
            sums[index] += cosine_similarity(before.double(), after.double(), dim=-1).sum().item()

        return hook

    handles = [layer.register_forward_hook(accumulate(n), with_kwargs=True) for n, layer in enumerate(layers(network))]
    with _removing(handles):
        run_forward(network, windows)
    tokens = sum(map(len, windows))
    return [1.0 - total / tokens for total in sums]


def run_forward(network: PreTrainedModel, windows: Sequence[Sequence[int]]) -> None:
    """Run one forward pass per window; registered hooks collect the results."""
    import torch

    with torch.inference_mode():
        for window in windows:
            network(torch.tensor([list(window)]), use_cache=False)


@contextmanager
def _removing(handles: Sequence[Any]) -> Iterator[None]:
    """Remove the hooks at the end of the block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
