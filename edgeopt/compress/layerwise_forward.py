"""Run calibration windows through a network one layer at a time and collect input statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from edgeopt.checkpoints import modeling

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

InputStatistic = Literal["none", "mean", "second_moment", "hessian"]
"""Statistic of a linear layer's input x: none, E[x] or E[x²] per channel, or E[x xᵀ]."""


@dataclass(kw_only=True)
class LayerwiseForward:
    """Hidden states of all calibration windows at the input of the current layer.

    A layer may be changed before `advance` passes the hidden states through it, so that later layers see the inputs
    that the compressed layers produce.

    Attributes:
        hidden_states: one tensor per window, shape (1, tokens, hidden).
        layer_kwargs: for each window the other arguments of every layer, such as position embeddings.
    """

    hidden_states: list[Tensor]
    layer_kwargs: list[list[dict[str, Any]]]

    @classmethod
    def start(cls, network: PreTrainedModel, windows: Sequence[Sequence[int]]) -> LayerwiseForward:
        """Embed every window; the hidden states are then at the input of layer 0."""
        import torch

        forward = cls(hidden_states=[], layer_kwargs=[])
        with _recorded_layer_calls(network) as calls, torch.inference_mode():
            for window in windows:
                network.get_decoder()(torch.tensor([list(window)]), use_cache=False)
                forward.hidden_states.append(calls[0][0])
                forward.layer_kwargs.append([kwargs for _, kwargs in calls])
                calls.clear()
        return forward

    def input_statistic(self, layer: nn.Module, layer_index: int, module: nn.Module, kind: InputStatistic) -> Tensor:
        """Return the `kind` of statistic over all tokens at the input of `module`, a submodule of `layer`.

        The result is float64 of shape (in_features,), or (in_features, in_features) for `hessian`.
        """
        mean = _RunningMean(kind)
        self.for_each_input(layer, layer_index, module, mean.add)
        return mean.value

    def for_each_input(
        self, layer: nn.Module, layer_index: int, module: nn.Module, callback: Callable[[Tensor], None]
    ) -> None:
        """Call `callback` with the input of `module`, once per window.

        The input has shape (1, tokens, in_features).
        """

        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            callback(inputs[0].detach())
            raise _ModuleReached

        handle = module.register_forward_pre_hook(hook)
        try:
            for hidden_states, kwargs in zip(self.hidden_states, self.layer_kwargs, strict=True):
                try:
                    _call(layer, hidden_states, kwargs[layer_index])
                except _ModuleReached:
                    continue
        finally:
            handle.remove()

    def advance(self, layer: nn.Module, layer_index: int) -> None:
        """Pass the hidden states through `layer`; they are then at the input of the next layer."""
        self.hidden_states = [
            _call(layer, hidden_states, kwargs[layer_index])
            for hidden_states, kwargs in zip(self.hidden_states, self.layer_kwargs, strict=True)
        ]


def lm_head_input_statistic(network: PreTrainedModel, windows: Sequence[Sequence[int]], kind: InputStatistic) -> Tensor:
    """Return the `kind` of statistic over all tokens at the input of lm_head, float64.

    Its shape is (hidden,), or (hidden, hidden) for `hessian`.
    """
    import torch

    mean = _RunningMean(kind)
    with torch.inference_mode():
        for window in windows:
            mean.add(network.get_decoder()(torch.tensor([list(window)]), use_cache=False).last_hidden_state)
    return mean.value


class _RunningMean:
    """Mean of an input statistic over tokens."""

    def __init__(self, kind: InputStatistic) -> None:
        self._kind = kind
        self._sum: Tensor | None = None
        self._tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add the tokens of `inputs`, shape (…, tokens, channels)."""
        tokens = inputs.detach().flatten(0, -2)
        if self._kind == "hessian":
            addend = (tokens.T @ tokens).double()
        else:
            addend = (tokens.double().square() if self._kind == "second_moment" else tokens.double()).sum(dim=0)
        self._sum = addend if self._sum is None else self._sum + addend
        self._tokens += len(tokens)

    @property
    def value(self) -> Tensor:
        assert self._sum is not None
        return self._sum / self._tokens


class _ModuleReached(Exception):  # noqa: N818 - control flow, not an error
    """Stop a layer's forward pass at the module whose input was requested."""


def _call(layer: nn.Module, hidden_states: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Return the hidden states after `layer`; some families return them inside a tuple."""
    import torch

    with torch.inference_mode():
        output = layer(hidden_states, **kwargs)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


@contextmanager
def _recorded_layer_calls(network: PreTrainedModel) -> Iterator[list[tuple[Tensor, dict[str, Any]]]]:
    """Record the arguments of every layer call; inside the block layers return their input unchanged."""
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
        calls.append((hidden_states, kwargs))
        return hidden_states

    for layer in modeling.layers(network):
        layer.forward = forward
    try:
        yield calls
    finally:
        for layer in modeling.layers(network):
            del layer.forward  # restores the method of the class
