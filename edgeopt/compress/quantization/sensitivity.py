"""What rounding one matrix costs the model, predicted from one forward and one backward pass.

A perturbation D of a matrix changes its output by D x. To second order the Kullback-Leibler divergence of the
model's predictions from its own is 1/2 E[(g · D x)²], where g is the gradient of the log-likelihood of tokens
drawn from the model (the Fisher information; optimal brain damage, LeCun et al. 1990). With independent output
channels this becomes 1/2 Σ_r G_r d_r H d_rᵀ: G the means of g², H the mean of x xᵀ, d_r the rows of D.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from edgeopt.checkpoints import modeling
from edgeopt.core.model_spec import EMBEDDING

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from edgeopt.core.protocols import Progress

TOKENS = "tokens"
"""How often each token occurs, which is what an embedding reads."""


def curvature(
    network: PreTrainedModel, windows: Sequence[Sequence[int]], *, seed: int, progress: Progress
) -> dict[str, Tensor]:
    """Means of g² over tokens by unit, float64, shape (output channels,); and the frequencies `TOKENS`."""
    import torch

    modules = {unit: [network.get_submodule(n) for n in names] for unit, names in modeling.units(network).items()}
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
            _add(sums, TOKENS, torch.bincount(ids[0], minlength=table.num_embeddings).double())
            _add(sums, EMBEDDING, (embedded.grad[0].double() * scale).square().sum(dim=0))
            count += len(window)
    return {name: total / count for name, total in sums.items()}


def predicted_divergence(change: Tensor, gradient: Tensor, hessian: Tensor) -> float:
    """KL in nats a token that adding `change` to a matrix is expected to cause.

    Args:
        change: shape (rows, columns).
        gradient: means of g², shape (rows,).
        hessian: mean of x xᵀ, shape (columns, columns).
    """
    change = change.double()
    return 0.5 * float(gradient @ ((change @ hessian) * change).sum(dim=1))


def predicted_divergence_of_lookup(change: Tensor, gradient: Tensor, frequency: Tensor) -> float:
    """The same of an embedding, whose rows are looked up: `gradient` of shape (columns,), `frequency` (rows,)."""
    return 0.5 * float(frequency @ (change.double().square() @ gradient))


@contextmanager
def _watched(unit: str, modules: Sequence[nn.Module], sums: dict[str, Tensor]) -> Iterator[None]:
    """Hooks that add up g² of a unit, whose modules' outputs stand one after another."""
    import torch

    gradients: dict[nn.Module, Tensor] = {}

    def left(module: nn.Module, _: object, outputs: tuple[Tensor, ...]) -> None:
        gradients[module] = outputs[0].double().square().flatten(0, -2).sum(dim=0)
        if len(gradients) == len(modules):
            _add(sums, unit, torch.cat([gradients.pop(part) for part in modules]))

    handles = [module.register_full_backward_hook(left) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(sums: dict[str, Tensor], name: str, new: Tensor) -> None:
    sums[name] = sums[name] + new if name in sums else new
