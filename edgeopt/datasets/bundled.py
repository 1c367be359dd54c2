"""Load the bundled texts, which are not in the training data of the reference model."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from edgeopt.core.corpus import Text
from edgeopt.datasets.file import read_documents


@dataclass(frozen=True, slots=True, kw_only=True)
class BundledText:
    """Python sources and documentation of one `split`."""

    split: Literal["calibration", "validation"]

    def load(self) -> Text:
        """Return all documents of the split."""
        path = Path(str(files("edgeopt") / "reference" / f"{self.split}.jsonl"))
        return Text(name=f"bundled {self.split}", documents=tuple(read_documents(path)))
