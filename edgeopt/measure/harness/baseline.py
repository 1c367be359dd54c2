"""Write the predictions of the uncompressed model, and read them to compare other engines with it."""

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
    """Predictions of the uncompressed engine on the evaluation windows.

    Attributes:
        nll: negative log-likelihood of each window, in nats.
        top1: the most probable token at each of the first predicted positions.
        array: log-probabilities at these positions, float16, shape (positions, vocabulary). Log-probabilities of
            probable tokens are near zero, where float16 is precise; logits are not.
    """

    nll: list[float]
    top1: list[int]
    array: np.ndarray

    def log_probabilities(self, start: int, count: int) -> np.ndarray:
        """Return normalized log-probabilities, float32, of at most `count` positions from `start`."""
        import numpy as np

        return log_softmax(np.asarray(self.array[start : start + count], dtype=np.float32))

    def write(self, folder: Path, windows: list[list[int]]) -> None:
        """Write the predictions and a digest of the windows to `folder`."""
        import numpy as np

        np.save(folder / _ARRAY, self.array)
        document = {"windows": digest(windows), "nll": self.nll, "top1": self.top1}
        (folder / _DOCUMENT).write_text(json.dumps(document))

    @classmethod
    def read(cls, folder: Path, windows: list[list[int]]) -> Self | None:
        """Read the baseline in `folder`; return None if its quality was not measured.

        Raises MeasureError if it was measured on other windows.
        """
        import numpy as np

        if not (folder / _DOCUMENT).is_file():
            return None
        document = json.loads((folder / _DOCUMENT).read_text())
        if document["windows"] != digest(windows):
            raise MeasureError(
                "the baseline must be measured on the same windows, got other windows",
                location=str(folder),
                hint="Measure the baseline again with the same text, window_tokens and max_windows",
            )
        return cls(nll=document["nll"], top1=document["top1"], array=np.load(folder / _ARRAY, mmap_mode="r"))


def to_float16(log_probabilities: np.ndarray) -> np.ndarray:
    """Convert to float16 and clip smaller values to its lowest finite value, -65504."""
    import numpy as np

    return np.asarray(np.maximum(log_probabilities, _FP16_LOWEST), dtype=np.float16)
