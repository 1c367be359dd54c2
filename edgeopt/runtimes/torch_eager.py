"""Run models with PyTorch in eager mode and fp32, the reference for all engines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from edgeopt.checkpoints import adapters, modeling
from edgeopt.checkpoints.tokenizer import eos_token_ids
from edgeopt.core.artifact import Checkpoint
from edgeopt.errors import ConfigError
from edgeopt.runtimes.decoding import greedy

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.checkpoints.adapters import LowRankUpdate
    from edgeopt.core.artifact import Engine
    from edgeopt.core.model_spec import ModelSpec
    from edgeopt.core.protocols import Progress, Session
    from edgeopt.core.result import Measurement
    from edgeopt.core.target import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Torch:
    """The reference runtime. Its engines are the fp32 checkpoint itself."""

    format: ClassVar[str] = "torch-1"
    LIBRARIES: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    SESSION_FIELDS: ClassVar[frozenset[str]] = frozenset()
    fallback: ClassVar[None] = None

    @property
    def baseline(self) -> Self:
        return self

    def check(self, spec: ModelSpec) -> None:
        if spec != spec.in_fp32:
            raise ConfigError(
                "the torch runtime supports only fp32 models, got a quantized one or another weight type",
                location="runtime",
                hint="Use runtime=genai",
            )

    def predict(self, spec: ModelSpec, target: Target, *, copied_bytes: int) -> tuple[Measurement, ...]:
        return ()

    def build(self, checkpoint: Checkpoint, directory: Path, progress: Progress) -> None:
        progress("linking the checkpoint")
        modeling.link_checkpoint(checkpoint, directory)

    def lint(self, engine: Engine) -> list[str]:
        return []

    def open(self, engine: Engine, *, threads: int) -> Session:
        engine.require_format(self.format)
        return TorchSession(engine, threads)


class TorchSession:
    """The network in memory. Generation uses a key-value cache."""

    backends = ("cpu",)

    def __init__(self, engine: Engine, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        checkpoint = Checkpoint(**{name: getattr(engine, name) for name in Checkpoint.__dataclass_fields__})
        self._network: Any = modeling.load(checkpoint)
        self._spec, self._directory = engine.spec, engine.directory
        self._eos_token_ids = eos_token_ids(engine.directory)

    def generate(
        self, tokens: Sequence[int], max_new_tokens: int, *, stop_at_end: bool = True, adapter: str | None = None
    ) -> Iterator[int]:
        import torch

        updates, cache = self._updates(adapter), None

        def forward(new_tokens: Sequence[int]) -> np.ndarray:
            nonlocal cache
            with torch.inference_mode(), adapters.attached(self._network, updates):
                output = self._network(
                    torch.tensor([list(new_tokens)]), past_key_values=cache, use_cache=True, logits_to_keep=1
                )
            cache = output.past_key_values
            logits: np.ndarray = output.logits[0, -1].numpy()
            return logits

        yield from greedy.decode(
            forward, tokens, max_new_tokens, eos_token_ids=self._eos_token_ids, stop_at_end=stop_at_end
        )

    def logits(self, tokens: Sequence[int], *, adapter: str | None = None) -> np.ndarray:
        import torch

        with torch.inference_mode(), adapters.attached(self._network, self._updates(adapter)):
            logits = self._network(torch.tensor([list(tokens)]), use_cache=False).logits[0]
        array: np.ndarray = logits.float().numpy()
        return array

    def close(self) -> None:
        self._network = None

    def _updates(self, adapter: str | None) -> dict[str, LowRankUpdate]:
        adapters.require(adapter, self._spec)
        return adapters.read(self._directory, adapter) if adapter else {}
