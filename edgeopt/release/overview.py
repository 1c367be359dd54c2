"""Summarize a registered model: its versions, the users who registered and approved them, and its ledger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edgeopt.core import mlflow_tags as tags
from edgeopt.release import signature
from edgeopt.release.ledger import hash_chain
from edgeopt.release.ledger.hash_chain import LEDGER_SUFFIX, Entry
from edgeopt.release.ledger.history import History
from edgeopt.release.registry import fast_reader
from edgeopt.release.registry.types import RegisteredModel, RegisteredVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionOverview:
    """One version of a registered model.

    Attributes:
        trial: study and number of the trial, as `STUDY/NUMBER`.
        digest: digest of the engine.
        registered_by: empty if the ledger does not contain the version.
        approved_by: users who approved this engine.
    """

    version: str
    aliases: tuple[str, ...]
    trial: str
    recipe: str
    run_id: str
    digest: str
    registered_by: str
    approved_by: tuple[str, ...]
    signed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOverview:
    """A registered model.

    Attributes:
        aliases: alias to version.
        versions: all versions, newest first.
        ledger: entries, oldest first.
    """

    model: str
    aliases: Mapping[str, str]
    versions: tuple[VersionOverview, ...]
    ledger: tuple[Entry, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the overview in plain JSON types; each ledger entry has its sentence as `description`."""
        return {
            "model": self.model,
            "aliases": dict(self.aliases),
            "versions": [asdict(version) for version in self.versions],
            "ledger": [entry.to_json() | {"description": entry.description} for entry in self.ledger],
        }


def overview(model: str, *, tracking_uri: str | None = None) -> ModelOverview:
    """Return the overview of a registered model. Raises InputError if the model does not exist."""
    return overview_of(model, *fast_reader.read_models([model, model + LEDGER_SUFFIX], tracking_uri))


def overview_of(model: str, registered_model: RegisteredModel, ledger: RegisteredModel) -> ModelOverview:
    """Return the overview of a model from its versions and those of its ledger. Raises InputError if both are empty."""
    entries = hash_chain.read_chain(ledger.versions).entries
    if not registered_model.versions and not entries:
        raise fast_reader.unregistered_model_error(model)
    history = History.from_entries(entries)
    aliases = registered_model.aliases
    versions = (_summarize(version, aliases, history) for version in reversed(registered_model.versions))
    return ModelOverview(model=model, aliases=aliases, versions=tuple(versions), ledger=entries)


def _summarize(version: RegisteredVersion, aliases: Mapping[str, str], history: History) -> VersionOverview:
    number, digest = version.number, version.tags.get(tags.ENGINE_DIGEST, "")
    registration = history.registrations.get(number)
    return VersionOverview(
        version=number,
        aliases=tuple(sorted(alias for alias, target in aliases.items() if target == number)),
        trial=version.tags.get(tags.TRIAL, ""),
        recipe=version.tags.get(tags.RECIPE, ""),
        run_id=version.run_id,
        digest=digest,
        registered_by=registration.actor if registration is not None else "",
        approved_by=tuple(sorted(history.approvers(number, digest))),
        signed=signature.TAG in version.tags,
    )
