"""Roll a registered model back by the policy that it was promoted by."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.core.protocols import Progress
from edgeopt.errors import ConfigError
from edgeopt.release import policy as policies
from edgeopt.release.registry.client import Reference
from edgeopt.release.rollback import Rollback, rollback
from edgeopt.release.webhook import Webhooks, secret_from_environment

if TYPE_CHECKING:
    from edgeopt.release.policy import Policy


def roll_back(
    reference: str,
    reason: str,
    *,
    to: str | None = None,
    policy: str | None = None,
    tracking_uri: str | None = None,
    config_dir: Path | None = None,
    progress: Progress = lambda _: None,
) -> Rollback:
    """Point an alias at an earlier version, with the signature key and webhooks of the model's policy.

    Args:
        reference: `NAME@ALIAS`.
        to: the earlier version; by default the one before the present.
        policy: name of the policy. By default the one in registry/ whose `model` is NAME, if there is one.
    """
    parsed = Reference.parse(reference)
    chosen = policy_of(parsed.name, policy, config_dir)
    return rollback(
        parsed,
        reason,
        to=to,
        public_key=None if chosen is None else chosen.public_key,
        webhooks=None if chosen is None else Webhooks(urls=chosen.webhooks, secret=secret_from_environment()),
        tracking_uri=tracking_uri,
        progress=progress,
    )


def policy_of(model: str, name: str | None, config_dir: Path | None) -> Policy | None:
    """Return the policy of a registered model: the named one, or the only one in registry/ for this model."""
    if name is not None:
        chosen = policies.load(name, config_dir)
        if chosen.model != model:
            raise ConfigError(
                f"the policy {chosen.name!r} must be for the model {model!r}, but it is for {chosen.model!r}",
                location="--policy",
                hint=f"Name a policy whose `model` is {model}",
            )
        return chosen
    candidates = policies.for_model(model, config_dir)
    if len(candidates) > 1:
        raise ConfigError(
            f"{len(candidates)} policies are for the model {model!r}: {', '.join(one.name for one in candidates)}",
            location="--policy",
            hint="Name one of them",
        )
    return candidates[0] if candidates else None
