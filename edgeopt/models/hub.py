"""A model on a Hugging Face hub, at a pinned revision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgeopt.errors import ConfigError, InputError, first_line


@dataclass(frozen=True, slots=True, kw_only=True)
class HubModel:
    """`repo` such as `HuggingFaceTB/SmolLM2-135M` at a `revision`: a commit, tag or branch.

    Only config, safetensors and tokenizer files are downloaded; code in the repository never runs.
    """

    repo: str
    revision: str

    def __post_init__(self) -> None:
        if self.repo.count("/") != 1:
            raise ConfigError(f"{self.repo!r} is not of the form owner/name", location="repo", hint="Give owner/name")

    def locate(self) -> Path:
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
                f"{self.repo} at {self.revision} cannot be downloaded ({reason})",
                location="model.repo",
                hint="Check name, revision and network, or download it elsewhere and use model=local model.path=FOLDER",
            ) from error
