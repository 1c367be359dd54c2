"""Post a message to the policy's webhooks after an alias moved.

Messages follow the Standard Webhooks specification (https://www.standardwebhooks.com). The id of a message is the
digest of its ledger entry, so a receiver recognizes repeated messages. The signature is HMAC-SHA256 over id, time and
body. The next promotion or rollback posts undelivered messages again, in order.
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
from edgeopt.release.ledger.events import Posted

if TYPE_CHECKING:
    from edgeopt.release.ledger.history import Notification
    from edgeopt.release.ledger.operation import ReleaseOperation

SECRET_VARIABLE = "EDGEOPT_WEBHOOK_SECRET"  # noqa: S105
"""Environment variable with the secret that sender and receivers share: `whsec_` and base64, or any text."""
RETRY_PAUSES_S = (1.0, 4.0, 16.0)
_TIMEOUT_S = 10
_BASE64_PREFIX = "whsec_"


def secret_from_environment() -> str:
    """Return the secret in the environment; empty if there is none."""
    return os.environ.get(SECRET_VARIABLE, "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhooks:
    """The webhooks of a policy, with the secret that signs their messages.

    Attributes:
        pause: function that waits for a number of seconds.

    Raises ConfigError if there are URLs but no secret.
    """

    urls: tuple[str, ...] = ()
    secret: str = ""
    pause: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        if self.urls and not self.secret:
            raise ConfigError(
                "a policy with webhooks needs a secret that signs the messages",
                location=SECRET_VARIABLE,
                hint=f"Set {SECRET_VARIABLE}, or remove the webhooks from the policy",
            )

    def deliver(self, operation: ReleaseOperation) -> None:
        """Post all undelivered messages.

        Raises TrackingError with every webhook that failed; promotion or rollback are done nevertheless.
        """
        failures = {}
        for url in self.urls:
            for message in list(operation.history.undelivered.get(url, ())):
                operation.progress(f"posting to {redact_password(url)}")
                digest = message.entry.digest
                failure = self._post(url, digest, _message_body(operation.model, message))
                operation.append(Posted(entry=digest, url=url, delivered=not failure), failure)
                if failure:
                    failures[url] = failure
                    break  # messages are delivered in order
        if failures:
            details = "; ".join(f"{redact_password(url)}: {failure}" for url, failure in failures.items())
            raise TrackingError(
                f"the operation is complete, but a webhook could not be notified ({details})",
                location=operation.model,
                hint="The next promotion or rollback posts the message again",
            )

    def _post(self, url: str, message_id: str, body: bytes) -> str:
        """Post one message with retries. Return the reason of a failure; empty on success."""
        import requests  # loading a policy does not need it

        failure = ""
        for pause_s in (0.0, *RETRY_PAUSES_S):
            self.pause(pause_s)
            signature = signature_headers(message_id, int(time.time()), body, self.secret)
            headers = {"Content-Type": "application/json", **signature}
            try:
                response = requests.post(url, data=body, headers=headers, timeout=_TIMEOUT_S, allow_redirects=False)
            except requests.RequestException as error:
                failure = type(error).__name__
                continue
            if 200 <= response.status_code < 300:
                return ""
            failure = f"HTTP {response.status_code}"
            if response.status_code < 500 and response.status_code != 429:
                return failure  # the receiver would reject a retry too
        return failure


def signature_headers(message_id: str, timestamp_s: int, body: bytes, secret: str) -> dict[str, str]:
    """Return the headers that prove origin, identity and time of a message."""
    is_base64 = secret.startswith(_BASE64_PREFIX)
    key = base64.b64decode(secret.removeprefix(_BASE64_PREFIX)) if is_base64 else secret.encode()
    content = f"{message_id}.{timestamp_s}.".encode() + body
    signature = base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()
    return {"webhook-id": message_id, "webhook-timestamp": str(timestamp_s), "webhook-signature": f"v1,{signature}"}


def url_problems(urls: Sequence[Any]) -> list[str]:
    """Return one sentence for each invalid URL of a policy."""
    return [
        f"a URL must begin with https:// or http://, got {url!r}"
        for url in urls
        if not isinstance(url, str) or not url.startswith(("https://", "http://"))
    ]


def _message_body(model: str, message: Notification) -> bytes:
    begun, moved = message.operation.entry, message.entry
    moves = [{"alias": a, "from": before, "to": to} for a, (before, to) in sorted(message.event.aliases.items())]
    document = {
        "type": f"edgeopt.{message.operation.event.action}",
        "timestamp": moved.at,
        "data": {"model": model, "moves": moves, "actor": moved.actor, "reason": begun.reason},
    }
    return json.dumps(document).encode()
