"""What the uncompressed model predicted, kept in its scratch folder for the engines compared with it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from edgeopt.core.config_objects import digest
from edgeopt.errors import MeasureError
from edgeopt.measure.stats.divergence import log_softmax

if TYPE_CHECKING:
    import numpy as np

_ARRAY, _DOCUMENT = "quality.npy", "quality.json"
_FP16_LOWEST = -65504.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """Predictions of one engine over evaluation windows.

    Attributes:
        nll: negative log-likelihood of each window, in nats.
        top1: the most probable token at each of the first predicted positions.
        array: log-probabilities at these positions, float16, shape (positions, vocabulary). Unlike
            logits, probable ones lie near zero, where float16 is fine.
    """

    nll: list[float]
    top1: list[int]
    array: np.ndarray

    def log_probabilities(self, start: int, count: int) -> np.ndarray:
        """Normalised, at most `count` positions from `start` on."""
        import numpy as np

        return log_softmax(np.asarray(self.array[start : start + count], dtype=np.float32))

    def write(self, folder: Path, windows: list[list[int]]) -> None:
        import numpy as np

        np.save(folder / _ARRAY, self.array)
        document = {"windows": digest(windows), "nll": self.nll, "top1": self.top1}
        (folder / _DOCUMENT).write_text(json.dumps(document))

    @classmethod
    def read(cls, folder: Path, windows: list[list[int]]) -> Self | None:
        """The baseline in `folder`; None where its quality was not measured.

        Raises MeasureError where it was measured on other windows.
        """
        import numpy as np

        if not (folder / _DOCUMENT).is_file():
            return None
        document = json.loads((folder / _DOCUMENT).read_text())
        if document["windows"] != digest(windows):
            raise MeasureError(
                "the baseline was measured on other windows of text",
                location=str(folder),
                hint="Measure the baseline again with this text, window_tokens and max_windows",
            )
        return cls(nll=document["nll"], top1=document["top1"], array=np.load(folder / _ARRAY, mmap_mode="r"))


def narrow(log_probability: np.ndarray) -> np.ndarray:
    """float16, with what lies below its range at its lowest finite value."""
    import numpy as np

    return np.asarray(np.maximum(log_probability, _FP16_LOWEST), dtype=np.float16)
