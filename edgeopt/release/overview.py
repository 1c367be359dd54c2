"""Summarize a registered model: its versions, the users who registered and approved them, and its ledger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeopt.core import mlflow_tags as tags
from edgeopt.release import signature
from edgeopt.release.ledger import hash_chain
from edgeopt.release.ledger.hash_chain import LEDGER_SUFFIX
from edgeopt.release.ledger.history import History, describe
from edgeopt.release.registry import fast_reader
from edgeopt.release.registry.types import RegisteredModel, RegisteredVersion


def overview(model: str, *, tracking_uri: str | None = None) -> dict[str, Any]:
    """Return a registered model as plain JSON data: versions, newest first, and ledger entries, oldest first.

    Raises InputError if the model does not exist.
    """
    return overview_of(model, *fast_reader.read_models([model, model + LEDGER_SUFFIX], tracking_uri))


def overview_of(model: str, registered_model: RegisteredModel, ledger: RegisteredModel) -> dict[str, Any]:
    """Return the overview of a model from its versions and those of its ledger. Raises InputError if both are empty."""
    entries = hash_chain.read_chain(ledger.versions).entries
    if not registered_model.versions and not entries:
        raise fast_reader.unregistered_model_error(model)
    history = History.from_entries(entries)
    aliases = registered_model.aliases
    return {
        "model": model,
        "aliases": aliases,
        "versions": [_summarize(version, aliases, history) for version in reversed(registered_model.versions)],
        "ledger": [{**entry.to_json(), "told": describe(entry.kind, entry.facts, entry.reason)} for entry in entries],
    }


def _summarize(version: RegisteredVersion, aliases: Mapping[str, str], history: History) -> dict[str, Any]:
    number, digest = version.number, version.tags.get(tags.ENGINE_DIGEST, "")
    registration = history.registrations.get(number)
    return {
        "version": number,
        "aliases": sorted(alias for alias, target in aliases.items() if target == number),
        "trial": version.tags.get(tags.TRIAL, ""),
        "recipe": version.tags.get(tags.RECIPE, ""),
        "run_id": version.run_id,
        "digest": digest,
        "registered_by": registration.actor if registration is not None else "",
        "approved_by": sorted(history.approvers(number, digest)),
        "signed": signature.TAG in version.tags,
    }
