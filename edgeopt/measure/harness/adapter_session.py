"""A session as its users see it who all choose the same adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.core.protocols import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSession:
    """The session with `adapter` in every request that names no other."""

    session: Session
    adapter: str

    @property
    def computed_by(self) -> Sequence[str]:
        return self.session.computed_by

    def generate(
        self, tokens: Sequence[int], max_new_tokens: int, *, stop_at_end: bool = True, adapter: str | None = None
    ) -> Iterator[int]:
        chosen = adapter or self.adapter
        return self.session.generate(tokens, max_new_tokens, stop_at_end=stop_at_end, adapter=chosen)

    def logits(self, tokens: Sequence[int], *, adapter: str | None = None) -> np.ndarray:
        return self.session.logits(tokens, adapter=adapter or self.adapter)

    def close(self) -> None:
        self.session.close()
