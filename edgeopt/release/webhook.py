"""Webhooks: whom the policy names is told of every alias that moved, once it has.

A message follows the Standard Webhooks specification (https://www.standardwebhooks.com): its id is the digest of the
ledger's entry, so a receiver knows what it has had before; its signature is HMAC-SHA256 over id, time and body. What
could not be delivered is sent again after the next promotion or rollback, in order.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeopt.core.redaction import redact_password
from edgeopt.errors import ConfigError, TrackingError

if TYPE_CHECKING:
    from edgeopt.release.ledger.hash_chain import Entry
    from edgeopt.release.ledger.operation import Desk

SECRET = "EDGEOPT_WEBHOOK_SECRET"  # noqa: S105
"""Environment variable: what sender and receivers share, `whsec_` and base64, or any text."""
PAUSES_S = (1.0, 4.0, 16.0)
"""Between the attempts at one message."""
_TIMEOUT_S = 10
_PREFIX = "whsec_"


def secret_of_environment() -> str:
    """Return the secret that the environment holds; empty if it holds none."""
    return os.environ.get(SECRET, "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhooks:
    """Where messages go, and what signs them.

    Attributes:
        pause: waits for some seconds.
    """

    urls: tuple[str, ...] = ()
    secret: str = ""
    pause: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        if self.urls and not self.secret:
            raise ConfigError(
                "the policy names webhooks, and there is no secret to sign their messages",
                location=SECRET,
                hint=f"Set {SECRET}, or take the webhooks out of the policy",
            )

    def deliver(self, desk: Desk) -> None:
        """Post what was not delivered yet. Raises TrackingError with what could not be, which changes nothing else."""
        failed = {}
        for url in self.urls:
            for begun, moved in list(desk.history.undelivered.get(url, ())):
                desk.progress(f"posting to {redact_password(url)}")
                why = self._post(url, moved.digest, _body(desk.model, begun, moved))
                desk.note("posted", why, entry=moved.digest, url=url, delivered=not why)
                if why:
                    failed[url] = why
                    break  # the others come after it
        if failed:
            told = "; ".join(f"{redact_password(url)}: {why}" for url, why in failed.items())
            raise TrackingError(
                f"all is done, but a webhook could not be told ({told})",
                location=desk.model,
                hint="The next promotion or rollback tells it",
            )

    def _post(self, url: str, identity: str, body: bytes) -> str:
        """Why the message could not be delivered; empty where it was."""
        import requests  # a policy alone does without

        why = ""
        for pause_s in (0.0, *PAUSES_S):
            self.pause(pause_s)
            headers = {"Content-Type": "application/json", **signed(identity, int(time.time()), body, self.secret)}
            try:
                answer = requests.post(url, data=body, headers=headers, timeout=_TIMEOUT_S, allow_redirects=False)
            except requests.RequestException as error:
                why = type(error).__name__
                continue
            if 200 <= answer.status_code < 300:
                return ""
            why = f"HTTP {answer.status_code}"
            if answer.status_code < 500 and answer.status_code != 429:
                return why  # it will not be taken another time either
        return why


def signed(identity: str, at_s: int, body: bytes, secret: str) -> dict[str, str]:
    """The headers by which a receiver knows that a message is genuine, new and not too old."""
    key = base64.b64decode(secret.removeprefix(_PREFIX)) if secret.startswith(_PREFIX) else secret.encode()
    content = f"{identity}.{at_s}.".encode() + body
    signature = base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()
    return {"webhook-id": identity, "webhook-timestamp": str(at_s), "webhook-signature": f"v1,{signature}"}


def checked(urls: Sequence[Any]) -> list[str]:
    """What is wrong with the addresses of a policy, one sentence each."""
    return [
        f"{url!r} is no address, which begins with https:// or http://"
        for url in urls
        if not isinstance(url, str) or not url.startswith(("https://", "http://"))
    ]


def _body(model: str, begun: Entry, moved: Entry) -> bytes:
    moves = [{"alias": a, "from": before, "to": to} for a, (before, to) in sorted(moved.facts["aliases"].items())]
    document = {
        "type": f"edgeopt.{begun.facts['action']}",
        "timestamp": moved.at,
        "data": {"model": model, "moves": moves, "actor": moved.actor, "reason": begun.reason},
    }
    return json.dumps(document).encode()
