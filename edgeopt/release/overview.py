"""A registered model at a glance: its versions, who stands behind them, and its ledger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeopt.core import mlflow_tags as tags
from edgeopt.release import signature
from edgeopt.release.ledger import hash_chain
from edgeopt.release.ledger.hash_chain import SUFFIX
from edgeopt.release.ledger.history import History, told
from edgeopt.release.registry import fast_reader
from edgeopt.release.registry.types import Registered, Version


def overview(model: str, *, tracking_uri: str | None = None) -> dict[str, Any]:
    """Plain data of all versions, the newest first, and of all entries. InputError where there is no such model."""
    return described(model, *fast_reader.read([model, model + SUFFIX], tracking_uri))


def described(model: str, registered: Registered, ledger: Registered) -> dict[str, Any]:
    """As `overview`, of what was read of the model and of its ledger."""
    entries = hash_chain.read(ledger.versions).entries
    if not registered.versions and not entries:
        raise fast_reader.unregistered(model)
    history = History.of(entries)
    return {
        "model": model,
        "aliases": registered.aliases,
        "versions": [_version(version, registered.aliases, history) for version in reversed(registered.versions)],
        "ledger": [{**e.to_json(), "told": told(e.kind, e.facts, e.reason)} for e in entries],
    }


def _version(version: Version, aliases: Mapping[str, str], history: History) -> dict[str, Any]:
    number, digest = version.number, version.tags.get(tags.ENGINE_DIGEST, "")
    known = history.registered.get(number)
    return {
        "version": number,
        "aliases": sorted(alias for alias, target in aliases.items() if target == number),
        "trial": version.tags.get(tags.TRIAL, ""),
        "recipe": version.tags.get(tags.RECIPE, ""),
        "run_id": version.run_id,
        "digest": digest,
        "registered_by": known.actor if known is not None else "",
        "approved_by": sorted(history.approvers(number, digest)),
        "signed": signature.TAG in version.tags,
    }
