"""What rounding one matrix costs the model, predicted from one forward and one backward pass.

A perturbation dW of a matrix changes its output by dW x. To second order the Kullback-Leibler divergence
of the model's predictions from its own is 1/2 E[(g · dW x)²], where g is the gradient of the log-likelihood
of tokens drawn from the model (the Fisher information; optimal brain damage, LeCun et al. 1990). With
independent channels this becomes 1/2 Σ_rc G_r X_c dW_rc², G and X the means of g² and x².
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from edgeopt import network as networks
from edgeopt.spec import EMBEDDING

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from edgeopt.ports import Progress


def curvature(
    network: PreTrainedModel, windows: Sequence[Sequence[int]], *, seed: int, progress: Progress
) -> dict[str, Tensor]:
    """Means over tokens of x² (`<unit>.x`, input channels) and g² (`<unit>.g`, output channels), float64.

    The embedding's inputs are tokens: its `x` is how often each token occurs, its `g` counts per channel.
    """
    import torch

    modules = {unit: [network.get_submodule(n) for n in names] for unit, names in networks.units(network).items()}
    sums: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    table: Any = network.get_input_embeddings()
    scale = float(getattr(table, "embed_scale", 1.0))  # Gemma multiplies what it looks up
    count = 0
    with ExitStack() as hooks:
        for unit, parts in modules.items():
            if unit != EMBEDDING:
                hooks.enter_context(_watched(unit, parts, sums))
        for number, window in enumerate(windows):
            progress(f"measuring sensitivity: window {number + 1} of {len(windows)}")
            ids = torch.tensor([list(window)])
            embedded = table(ids).detach().requires_grad_(True)
            logits = network(inputs_embeds=embedded, use_cache=False).logits[0].float()
            drawn = torch.multinomial(logits.detach().softmax(dim=-1), 1, generator=generator)
            torch.autograd.backward(-logits.log_softmax(dim=-1).gather(1, drawn).sum())
            assert embedded.grad is not None
            occurs = torch.bincount(ids[0], minlength=table.num_embeddings).double()
            _add(sums, f"{EMBEDDING}.x", occurs)
            _add(sums, f"{EMBEDDING}.g", (embedded.grad[0].double() * scale).square().sum(dim=0))
            count += len(window)
    return {name: total / count for name, total in sums.items()}


def predicted_divergence(change: Tensor, unit: str, means: Mapping[str, Tensor]) -> float:
    """KL in nats a token that adding `change`, (rows, columns), to the matrices of `unit` is expected to cause."""
    x, g = means[f"{unit}.x"], means[f"{unit}.g"]
    squared = change.double().square()
    if unit == EMBEDDING:  # rows are tokens, which are looked up; columns are the outputs
        return 0.5 * float(x @ (squared @ g))
    return 0.5 * float(g @ (squared @ x))


@contextmanager
def _watched(unit: str, modules: Sequence[nn.Module], sums: dict[str, Tensor]) -> Iterator[None]:
    """Hooks that add up x² and g² of a unit, whose modules read the same input."""
    import torch

    gradients: dict[nn.Module, Tensor] = {}

    def entered(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        _add(sums, f"{unit}.x", inputs[0].detach().double().square().flatten(0, -2).sum(dim=0))

    def left(module: nn.Module, _: object, outputs: tuple[Tensor, ...]) -> None:
        gradients[module] = outputs[0].double().square().flatten(0, -2).sum(dim=0)
        if len(gradients) == len(modules):
            _add(sums, f"{unit}.g", torch.cat([gradients.pop(part) for part in modules]))

    handles = [modules[0].register_forward_pre_hook(entered)]
    handles += [module.register_full_backward_hook(left) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(sums: dict[str, Tensor], name: str, new: Tensor) -> None:
    sums[name] = sums[name] + new if name in sums else new
