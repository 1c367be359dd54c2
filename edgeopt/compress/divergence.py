"""What a network predicts on windows of text, and how far a change moves it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgeopt.compress.training import next_token_loss

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def predictions(network: PreTrainedModel, windows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Log-probabilities of the next token at every position, (tokens, vocabulary) for each window."""
    import torch

    with torch.inference_mode():
        return [_log_probabilities(network, window) for window in windows]


def divergence(network: PreTrainedModel, windows: Sequence[Sequence[int]], reference: Sequence[Tensor]) -> float:
    """Mean KL(reference ‖ network) in nats a token; `reference` as `predictions` gives it."""
    import torch

    total = 0.0
    with torch.inference_mode():
        for window, expected in zip(windows, reference, strict=True):
            total += float((expected.exp() * (expected - _log_probabilities(network, window))).sum())
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
