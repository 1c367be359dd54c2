"""PyTorch in eager mode and fp32: the reference that every engine is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from edgeopt.checkpoints import adapters, modeling
from edgeopt.checkpoints.tokenizer import end_tokens
from edgeopt.core.artifact import Checkpoint
from edgeopt.errors import ConfigError
from edgeopt.runtimes.decoding import greedy

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.checkpoints.adapters import LowRank
    from edgeopt.core.artifact import Engine
    from edgeopt.core.model_spec import ModelSpec
    from edgeopt.core.protocols import Progress, Session
    from edgeopt.core.result import Measurement
    from edgeopt.core.target import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Torch:
    """Engines are the float checkpoint itself."""

    format: ClassVar[str] = "torch-1"
    LIBRARIES: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    SESSION_FIELDS: ClassVar[frozenset[str]] = frozenset()
    fallback: ClassVar[None] = None

    @property
    def baseline(self) -> Self:
        return self

    def check(self, spec: ModelSpec) -> None:
        if spec != spec.in_fp32:
            raise ConfigError("the torch runtime computes in fp32 alone", location="runtime", hint="Use runtime=genai")

    def predict(self, spec: ModelSpec, target: Target, *, carried_bytes: int) -> tuple[Measurement, ...]:
        return ()

    def build(self, checkpoint: Checkpoint, directory: Path, progress: Progress) -> None:
        progress("linking the checkpoint")
        modeling.link(checkpoint, directory)

    def lint(self, engine: Engine) -> list[str]:
        return []

    def open(self, engine: Engine, *, threads: int) -> Session:
        engine.require_format(self.format)
        return TorchSession(engine, threads)


class TorchSession:
    """The network in memory, with a key-value cache while it generates."""

    computed_by = ("cpu",)

    def __init__(self, engine: Engine, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        checkpoint = Checkpoint(**{name: getattr(engine, name) for name in Checkpoint.__dataclass_fields__})
        self._network: Any = modeling.load(checkpoint)
        self._spec, self._directory = engine.spec, engine.directory
        self._ends = end_tokens(engine.directory)

    def generate(
        self, tokens: Sequence[int], max_new_tokens: int, *, stop_at_end: bool = True, adapter: str | None = None
    ) -> Iterator[int]:
        import torch

        updates, cache = self._updates(adapter), None

        def read(part: Sequence[int]) -> np.ndarray:
            nonlocal cache
            with torch.inference_mode(), adapters.attached(self._network, updates):
                output = self._network(
                    torch.tensor([list(part)]), past_key_values=cache, use_cache=True, logits_to_keep=1
                )
            cache = output.past_key_values
            scores: np.ndarray = output.logits[0, -1].numpy()
            return scores

        yield from greedy.decode(read, tokens, max_new_tokens, ends=self._ends, stop_at_end=stop_at_end)

    def logits(self, tokens: Sequence[int], *, adapter: str | None = None) -> np.ndarray:
        import torch

        with torch.inference_mode(), adapters.attached(self._network, self._updates(adapter)):
            logits = self._network(torch.tensor([list(tokens)]), use_cache=False).logits[0]
        array: np.ndarray = logits.float().numpy()
        return array

    def close(self) -> None:
        self._network = None

    def _updates(self, adapter: str | None) -> dict[str, LowRank]:
        adapters.require(adapter, self._spec)
        return adapters.read(self._directory, adapter) if adapter else {}
