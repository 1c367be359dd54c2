"""A data set on a Hugging Face hub, at a pinned revision; needs the `datasets` package."""

from __future__ import annotations

from dataclasses import dataclass

from edgeopt.core.corpus import Text
from edgeopt.errors import ConfigError, InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class HubText:
    """The first `documents` rows of `column` in one split of a hub data set."""

    repo: str
    revision: str
    split: str
    config: str | None = None
    column: str = "text"
    documents: int = 1000

    def __post_init__(self) -> None:
        if self.documents < 1:
            raise ConfigError(f"{self.documents} documents are too few", location="documents", hint="Give 1 or more")

    def load(self) -> Text:
        try:
            import datasets
        except ImportError as error:
            raise InputError(
                "hub texts need the datasets package",
                location="text",
                hint="pip install 'edgeopt[hub]', or give a local file",
            ) from error
        try:
            rows = datasets.load_dataset(
                self.repo, self.config, split=f"{self.split}[:{self.documents}]", revision=self.revision
            )
        except Exception as error:  # the library raises many unrelated types
            raise InputError(
                f"{self.repo} at {self.revision} cannot be loaded ({error})",
                location="text.repo",
                hint="Check name, revision, split and network, or give a local file",
            ) from error
        if self.column not in rows.column_names:
            raise InputError(
                f"column {self.column!r} is not there",
                location="text.column",
                hint=f"Choose: {', '.join(rows.column_names)}",
            )
        return Text(name=f"{self.repo}:{self.split}", documents=tuple(map(str, rows[self.column])))
