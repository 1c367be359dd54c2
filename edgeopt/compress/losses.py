"""Compute the loss, the perplexity and the KL divergence of a network on windows of token ids."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

LossFunction = Callable[["nn.Module", Sequence[int]], "Tensor"]
"""Returns the mean loss in nats of a network on the windows with the given indices."""


def pad_batch(batch: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor]:
    """Return token ids and labels, int64 of shape (windows, longest window); padding has the label -100."""
    import torch

    length = max(map(len, batch))
    ids = torch.tensor([[*window, *([0] * (length - len(window)))] for window in batch], device=device)
    labels = torch.tensor([[*window, *([-100] * (length - len(window)))] for window in batch], device=device)
    return ids, labels


def next_token_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean next-token negative log-likelihood in nats, without padding.

    Args:
        logits: shape (windows, tokens, vocabulary).
        labels: int64, shape (windows, tokens); -100 marks padding.
    """
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)


def next_token_loss(windows: Sequence[Sequence[int]]) -> LossFunction:
    """Return the language modelling loss on these windows."""

    def loss(network: nn.Module, batch: Sequence[int]) -> Tensor:
        ids, labels = pad_batch([windows[n] for n in batch], next(network.parameters()).device)
        return next_token_cross_entropy(network(input_ids=ids, use_cache=False).logits, labels)

    return loss


def log_probabilities(network: PreTrainedModel, windows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return next-token log-probabilities at every position, one tensor (tokens, vocabulary) per window."""
    import torch

    with torch.inference_mode():
        return [_log_probabilities(network, window) for window in windows]


def kl_divergence(network: PreTrainedModel, windows: Sequence[Sequence[int]], reference: Sequence[Tensor]) -> float:
    """Return the mean KL(reference ‖ network) in nats per token.

    It computes Σ p log(p/q) - p + q. The sums of p and q are both 1, so the value is the KL divergence, but rounding
    errors of the logarithms enter only squared. They would hide a Σ p log(p/q) below 1e-6.

    Args:
        reference: log-probabilities from `log_probabilities`.
    """
    import torch

    total = 0.0
    with torch.inference_mode():
        for window, log_p in zip(windows, reference, strict=True):
            log_q = _log_probabilities(network, window)
            p = log_p.exp()
            total += float((p * (log_p - log_q) + (log_q.exp() - p)).sum())
    return total / sum(map(len, windows))


def perplexity(network: PreTrainedModel, windows: Sequence[Sequence[int]]) -> float:
    """Return exp of the mean negative log-likelihood of all tokens except the first of each window."""
    import torch

    loss, total = next_token_loss(windows), 0.0
    with torch.inference_mode():
        for index, window in enumerate(windows):
            total += float(loss(network, [index])) * (len(window) - 1)
    return math.exp(total / sum(len(window) - 1 for window in windows))


def _log_probabilities(network: PreTrainedModel, window: Sequence[int]) -> Tensor:
    import torch

    logits: Tensor = network(torch.tensor([list(window)]), use_cache=False).logits[0]
    return logits.log_softmax(dim=-1)
