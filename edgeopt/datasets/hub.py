"""Load a data set from a Hugging Face hub at a pinned revision. Needs the `datasets` package."""

from __future__ import annotations

from dataclasses import dataclass

from edgeopt.core.corpus import Text
from edgeopt.errors import ConfigError, InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class HubText:
    """Text column of a data set on a Hugging Face hub.

    Attributes:
        repo: `owner/name` of the data set.
        revision: commit, tag or branch.
        split: split of the data set, such as `test`.
        config: configuration of the data set; None for its default.
        column: column with the text.
        documents: number of rows to read from the start, one document each.
    """

    repo: str
    revision: str
    split: str
    config: str | None = None
    column: str = "text"
    documents: int = 1000

    def __post_init__(self) -> None:
        if self.documents < 1:
            raise ConfigError(f"`documents` must be at least 1, got {self.documents}", location="documents")

    def load(self) -> Text:
        """Return one document per row. Raises InputError if the data set cannot be loaded."""
        try:
            import datasets
        except ImportError as error:
            raise InputError(
                "texts from a hub need the `datasets` package",
                location="text",
                hint="Run pip install 'edgeopt[hub]', or use a local file",
            ) from error
        try:
            rows = datasets.load_dataset(
                self.repo, self.config, split=f"{self.split}[:{self.documents}]", revision=self.revision
            )
        except Exception as error:  # the library raises many unrelated types
            raise InputError(
                f"cannot load {self.repo} at revision {self.revision} ({error})",
                location="text.repo",
                hint="Check name, revision, split and network, or use a local file",
            ) from error
        if self.column not in rows.column_names:
            raise InputError(
                f"`column` must be one of {', '.join(rows.column_names)}; got {self.column!r}",
                location="text.column",
            )
        return Text(name=f"{self.repo}:{self.split}", documents=tuple(map(str, rows[self.column])))
