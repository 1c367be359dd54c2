"""A registered model at a glance: its versions, who stands behind them, and its ledger."""

from __future__ import annotations

from typing import Any

from mlflow import MlflowClient

from edgeopt import tags
from edgeopt.errors import InputError
from edgeopt.release import registry, signature
from edgeopt.release.history import History, told
from edgeopt.release.ledger import Ledger


def overview(model: str, *, tracking_uri: str | None = None) -> dict[str, Any]:
    """Plain data of all versions, the newest first, and of all entries. InputError where there is no such model."""
    with registry.answering(tracking_uri) as client:
        return of_model(client, model)


def of_model(client: MlflowClient, model: str) -> dict[str, Any]:
    """As `overview`, by a client that is there already."""
    versions = registry.versions(client, model)
    aliases = registry.aliases(client, model)
    entries = Ledger(client, model).read().entries
    if not versions and not entries:
        raise InputError(f"no model {model!r} is registered", place="NAME", mend="Promote a study: `edgeopt promote`")
    history = History.of(entries)
    return {
        "model": model,
        "aliases": aliases,
        "versions": [_described(version, aliases, history) for version in reversed(versions)],
        "ledger": [{**e.to_json(), "told": told(e.kind, e.facts, e.reason)} for e in entries],
    }


def _described(version: Any, aliases: dict[str, str], history: History) -> dict[str, Any]:
    number, digest = str(version.version), version.tags.get(tags.ENGINE_DIGEST, "")
    known = history.registered.get(number)
    return {
        "version": number,
        "aliases": sorted(alias for alias, target in aliases.items() if target == number),
        "trial": version.tags.get(tags.TRIAL, ""),
        "recipe": version.tags.get(tags.RECIPE, ""),
        "run_id": version.run_id or "",
        "digest": digest,
        "registered_by": known.actor if known is not None else "",
        "approved_by": sorted(history.approvers(number, digest)),
        "signed": signature.TAG in version.tags,
    }
