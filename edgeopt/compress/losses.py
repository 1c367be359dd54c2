"""What a network predicts on windows of text: how well, and how far a change moves it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

LossFunction = Callable[["nn.Module", Sequence[int]], "Tensor"]
"""Mean loss in nats of a network on the windows with these numbers."""


def pad_batch(batch: Sequence[Sequence[int]], where: Any) -> tuple[Tensor, Tensor]:
    """Token ids and labels, int64 of shape (windows, longest); what is padding has the label -100."""
    import torch

    length = max(map(len, batch))
    ids = torch.tensor([[*window, *([0] * (length - len(window)))] for window in batch], device=where)
    labels = torch.tensor([[*window, *([-100] * (length - len(window)))] for window in batch], device=where)
    return ids, labels


def next_token_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean next-token negative log-likelihood in nats; padding is not counted."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)


def next_token_loss(windows: Sequence[Sequence[int]]) -> LossFunction:
    """The loss of language modelling on these windows."""

    def loss(network: nn.Module, batch: Sequence[int]) -> Tensor:
        ids, labels = pad_batch([windows[n] for n in batch], next(network.parameters()).device)
        return next_token_cross_entropy(network(input_ids=ids, use_cache=False).logits, labels)

    return loss


def log_probabilities(network: PreTrainedModel, windows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Log-probabilities of the next token at every position, (tokens, vocabulary) for each window."""
    import torch

    with torch.inference_mode():
        return [_log_probabilities(network, window) for window in windows]


def kl_divergence(network: PreTrainedModel, windows: Sequence[Sequence[int]], reference: Sequence[Tensor]) -> float:
    """Mean KL(reference ‖ network) in nats a token; `reference` as `predictions` gives it.

    Σ p log(p/q) - p + q, whose last two sums are both 1: rounded logarithms change it by no more than the square of
    what they are off, where of Σ p log(p/q) alone they would leave nothing below 1e-6.
    """
    import torch

    total = 0.0
    with torch.inference_mode():
        for window, expected in zip(windows, reference, strict=True):
            found = _log_probabilities(network, window)
            likely = expected.exp()
            total += float((likely * (expected - found) + (found.exp() - likely)).sum())
    return total / sum(map(len, windows))


def perplexity(network: PreTrainedModel, windows: Sequence[Sequence[int]]) -> float:
    """exp of the mean negative log-likelihood of every token after a window's first."""
    import torch

    loss, total = next_token_loss(windows), 0.0
    with torch.inference_mode():
        for number, window in enumerate(windows):
            total += float(loss(network, [number])) * (len(window) - 1)
    return math.exp(total / sum(len(window) - 1 for window in windows))


def _log_probabilities(network: PreTrainedModel, window: Sequence[int]) -> Tensor:
    import torch

    logits: Tensor = network(torch.tensor([list(window)]), use_cache=False).logits[0]
    return logits.log_softmax(dim=-1)
