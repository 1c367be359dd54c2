"""Hidden states on their way through a network's layers, and what they show of each matrix's input."""

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
"""What is known of a matrix's input: nothing, the mean of x or of x² a channel, or the mean of x xᵀ."""


@dataclass(kw_only=True)
class LayerwiseForward:
    """Hidden states of every window on their way through the layers, with each layer's other arguments."""

    hidden: list[Tensor]
    arguments: list[list[dict[str, Any]]]

    @classmethod
    def start(cls, network: PreTrainedModel, windows: Sequence[Sequence[int]]) -> LayerwiseForward:
        import torch

        stream = cls(hidden=[], arguments=[])
        with _recorded(network) as calls, torch.inference_mode():
            for window in windows:
                network.get_decoder()(torch.tensor([list(window)]), use_cache=False)
                stream.hidden.append(calls[0][0])
                stream.arguments.append([arguments for _, arguments in calls])
                calls.clear()
        return stream

    def input_statistic(self, layer: nn.Module, number: int, module: nn.Module, kind: InputStatistic) -> Tensor:
        """Mean of x, x² or x xᵀ over all tokens that reach `module` of `layer`, float64."""
        gathered = _Gathered(kind)
        self.for_each_input(layer, number, module, gathered.add)
        return gathered.mean

    def for_each_input(self, layer: nn.Module, number: int, module: nn.Module, see: Callable[[Tensor], None]) -> None:
        """Show `see` what reaches `module` of `layer`, one window after another, shape (1, tokens, columns)."""

        def watch(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            see(inputs[0].detach())
            raise _Reached

        handle = module.register_forward_pre_hook(watch)
        try:
            for hidden, arguments in zip(self.hidden, self.arguments, strict=True):
                try:
                    _call(layer, hidden, arguments[number])
                except _Reached:
                    continue
        finally:
            handle.remove()

    def advance(self, layer: nn.Module, number: int) -> None:
        self.hidden = [
            _call(layer, hidden, arguments[number])
            for hidden, arguments in zip(self.hidden, self.arguments, strict=True)
        ]


def lm_head_input_statistic(network: PreTrainedModel, windows: Sequence[Sequence[int]], kind: InputStatistic) -> Tensor:
    """Mean of x² or x xᵀ over all tokens that reach lm_head, float64."""
    import torch

    gathered = _Gathered(kind)
    with torch.inference_mode():
        for window in windows:
            gathered.add(network.get_decoder()(torch.tensor([list(window)]), use_cache=False).last_hidden_state)
    return gathered.mean


class _Gathered:
    """A running mean over tokens."""

    def __init__(self, kind: InputStatistic) -> None:
        self._kind = kind
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, inputs: Tensor) -> None:
        tokens = inputs.detach().flatten(0, -2)
        if self._kind == "hessian":
            new = (tokens.T @ tokens).double()
        else:
            new = (tokens.double().square() if self._kind == "second_moment" else tokens.double()).sum(dim=0)
        self._sum = new if self._sum is None else self._sum + new
        self._count += len(tokens)

    @property
    def mean(self) -> Tensor:
        assert self._sum is not None
        return self._sum / self._count


class _Reached(Exception):  # noqa: N818 - a signal, no error
    """The wanted module was reached: nothing after it needs to be computed."""


def _call(layer: nn.Module, hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    import torch

    with torch.inference_mode():
        output = layer(hidden, **arguments)
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


@contextmanager
def _recorded(network: PreTrainedModel) -> Iterator[list[tuple[Tensor, dict[str, Any]]]]:
    """Calls of the layers, which meanwhile pass their input on as it is."""
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def passing(hidden_states: Tensor, **arguments: Any) -> Tensor:
        calls.append((hidden_states, arguments))
        return hidden_states

    for layer in modeling.layers(network):
        layer.forward = passing
    try:
        yield calls
    finally:
        for layer in modeling.layers(network):
            del layer.forward  # that of its class comes back
