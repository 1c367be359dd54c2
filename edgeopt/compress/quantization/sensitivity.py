"""Predict the KL divergence that the quantization of one matrix causes, from one forward and one backward pass.

A change D of a matrix changes its output by D x. To second order the KL divergence of the model's predictions is
1/2 E[(g · D x)²], where g is the gradient of the log-likelihood of tokens sampled from the model (Fisher information;
Optimal Brain Damage, LeCun et al. 1990). With independent output channels this becomes 1/2 Σ_r F_r d_r H d_rᵀ, with
F = E[g²] per output channel, H = E[x xᵀ] and d_r the rows of D.
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

ROW_FREQUENCIES = "tokens"
"""Key of the frequency of each token id, which weights the rows of an embedding."""


def fisher_diagonals(
    network: PreTrainedModel, windows: Sequence[Sequence[int]], *, seed: int, progress: Progress
) -> dict[str, Tensor]:
    """Return F = E[g²] over tokens per output channel of every unit.

    Args:
        seed: for the tokens that are sampled from the model's predictions.

    Returns:
        float64 tensors of shape (rows,) by unit, and ROW_FREQUENCIES: relative frequency of each token id,
        shape (vocabulary,). For the embedding, g is the gradient with respect to its output, shape (columns,).
    """
    import torch

    modules = {
        unit: [network.get_submodule(n) for n in names] for unit, names in modeling.unit_modules(network).items()
    }
    sums: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    embedding: Any = network.get_input_embeddings()
    scale = float(getattr(embedding, "embed_scale", 1.0))  # Gemma multiplies the embeddings by it
    tokens = 0
    with ExitStack() as hooks:
        for unit, unit_modules in modules.items():
            if unit != EMBEDDING:
                hooks.enter_context(_accumulated_squared_gradients(unit, unit_modules, sums))
        for index, window in enumerate(windows):
            progress(f"computing Fisher information: window {index + 1} of {len(windows)}")
            ids = torch.tensor([list(window)])
            embedded = embedding(ids).detach().requires_grad_(True)
            logits = network(inputs_embeds=embedded, use_cache=False).logits[0].float()
            sampled = torch.multinomial(logits.detach().softmax(dim=-1), 1, generator=generator)
            torch.autograd.backward(-logits.log_softmax(dim=-1).gather(1, sampled).sum())
            assert embedded.grad is not None
            _add(sums, ROW_FREQUENCIES, torch.bincount(ids[0], minlength=embedding.num_embeddings).double())
            _add(sums, EMBEDDING, (embedded.grad[0].double() * scale).square().sum(dim=0))
            tokens += len(window)
    return {name: total / tokens for name, total in sums.items()}


def predict_divergence(change: Tensor, fisher: Tensor, hessian: Tensor) -> float:
    """Return the predicted KL divergence 1/2 Σ_r F_r d_r H d_rᵀ of a matrix change, in nats per token.

    Args:
        change: D, shape (rows, columns).
        fisher: F, float64, shape (rows,).
        hessian: H = E[x xᵀ], float64, shape (columns, columns).
    """
    change = change.double()
    return 0.5 * float(fisher @ ((change @ hessian) * change).sum(dim=1))


def predict_embedding_divergence(change: Tensor, fisher: Tensor, frequency: Tensor) -> float:
    """Return the predicted KL divergence 1/2 Σ_t p_t Σ_c F_c d_tc² of an embedding change, in nats per token.

    Args:
        change: D, shape (tokens, columns).
        fisher: F, float64, shape (columns,).
        frequency: p, the relative frequency of each token, float64, shape (tokens,).
    """
    return 0.5 * float(frequency @ (change.double().square() @ fisher))


@contextmanager
def _accumulated_squared_gradients(unit: str, modules: Sequence[nn.Module], sums: dict[str, Tensor]) -> Iterator[None]:
    """Add g² of the unit's outputs to `sums` with backward hooks; outputs of several modules are concatenated."""
    import torch

    pending: dict[nn.Module, Tensor] = {}

    def hook(module: nn.Module, _: object, output_gradients: tuple[Tensor, ...]) -> None:
        pending[module] = output_gradients[0].double().square().flatten(0, -2).sum(dim=0)
        if len(pending) == len(modules):
            _add(sums, unit, torch.cat([pending.pop(module) for module in modules]))

    handles = [module.register_full_backward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(sums: dict[str, Tensor], name: str, addend: Tensor) -> None:
    sums[name] = sums[name] + addend if name in sums else addend
