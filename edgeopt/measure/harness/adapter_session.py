"""Wrap a session so that requests without an adapter use a default adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.core.protocols import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSession:
    """Session that adds `adapter` to every request without an adapter."""

    session: Session
    adapter: str

    @property
    def backends(self) -> Sequence[str]:
        """Return the execution providers, backends or GPUs of the wrapped session."""
        return self.session.backends

    def generate(
        self, tokens: Sequence[int], max_new_tokens: int, *, stop_at_end: bool = True, adapter: str | None = None
    ) -> Iterator[int]:
        """Decode greedily with `adapter`, or with the default adapter."""
        selected = adapter or self.adapter
        return self.session.generate(tokens, max_new_tokens, stop_at_end=stop_at_end, adapter=selected)

    def logits(self, tokens: Sequence[int], *, adapter: str | None = None) -> np.ndarray:
        """Return next-token logits of shape (tokens, vocabulary) with `adapter`, or with the default adapter."""
        return self.session.logits(tokens, adapter=adapter or self.adapter)

    def close(self) -> None:
        """Close the wrapped session."""
        self.session.close()
