"""The float checkpoint of a model in the MLflow registry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgeopt.errors import ConfigError, InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredModel:
    """`uri` is `models:/NAME@ALIAS` or `models:/NAME/VERSION` of a model in Hugging Face layout."""

    uri: str

    def __post_init__(self) -> None:
        if not self.uri.startswith("models:/"):
            raise ConfigError(
                f"{self.uri!r} is not a registry URI", place="uri", mend="Give models:/NAME@ALIAS or models:/NAME/VERSION"
            )

    def locate(self) -> Path:
        import mlflow
        from mlflow.exceptions import MlflowException

        try:
            folder = Path(mlflow.artifacts.download_artifacts(self.uri))
        except MlflowException as error:
            raise InputError(
                f"{self.uri} cannot be fetched ({error.message})", place="model.uri",
                mend="Check name, version or alias, and MLFLOW_TRACKING_URI",
            ) from error
        holders = [p.parent for p in sorted(folder.rglob("config.json")) if list(p.parent.glob("*.safetensors"))]
        if not holders:
            raise InputError(
                f"{self.uri} holds no config.json with safetensors", place="model.uri",
                mend="Register the model's Hugging Face folder, not an engine",
            )
        return holders[0]
