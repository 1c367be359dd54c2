"""Download a model from a Hugging Face hub at a pinned revision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgeopt.errors import ConfigError, InputError, first_line


@dataclass(frozen=True, slots=True, kw_only=True)
class HubModel:
    """Model on a Hugging Face hub.

    Only config, safetensors and tokenizer files are downloaded. Code in the repository is never executed.

    Attributes:
        repo: `owner/name`, such as `HuggingFaceTB/SmolLM2-135M`.
        revision: commit, tag or branch.
    """

    repo: str
    revision: str

    def __post_init__(self) -> None:
        if self.repo.count("/") != 1:
            raise ConfigError(f"`repo` must have the form owner/name, got {self.repo!r}", location="repo")

    def locate(self) -> Path:
        """Return the folder of the snapshot in the hub's cache. Raises InputError if the download fails."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(
                snapshot_download(
                    self.repo, revision=self.revision, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"]
                )
            )
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = first_line(error).rstrip(".")
            raise InputError(
                f"cannot download {self.repo} at revision {self.revision} ({reason})",
                location="model.repo",
                hint="Check name, revision and network, or use a local copy with model=local model.path=FOLDER",
            ) from error
