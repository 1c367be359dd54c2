"""Describe registered models and their versions as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

NOT_FOUND_CODES = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")
"""MLflow error codes for a model, alias or version that does not exist; which one depends on the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredVersion:
    """One version of a registered model."""

    number: str
    run_id: str
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredModel:
    """A registered model. Both fields are empty if the model does not exist.

    Attributes:
        aliases: alias to version number.
        versions: all versions, sorted by number.
    """

    aliases: Mapping[str, str]
    versions: tuple[RegisteredVersion, ...]
