"""Test that webhook messages are signed, ordered and repeated until they are accepted."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from edgeopt.errors import ConfigError, TrackingError
from edgeopt.release import webhook
from edgeopt.release.audit import audit
from edgeopt.release.promote import promote
from edgeopt.release.rollback import rollback
from edgeopt.release.webhook import Webhooks, signature_headers

from .conftest import FinishedStudy
from .test_release import BEST, aliases, reference


@dataclass
class Receiver:
    """A webhook that answers with `codes` in turn, then with 200, and keeps all requests."""

    url: str
    codes: list[int] = field(default_factory=list)
    requests: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.requests]


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.setattr(webhook, "RETRY_PAUSES_S", (0.0, 0.0, 0.0))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.requests.append(({k.lower(): v for k, v in self.headers.items()}, body))
            self.send_response(receiver.codes.pop(0) if receiver.codes else 200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver = Receiver(url=f"http://127.0.0.1:{server.server_port}/hook")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield receiver
    server.shutdown()


def arguments_with_webhook(study: FinishedStudy, receiver: Receiver, **overrides: Any) -> dict[str, Any]:
    return study.arguments(policy=replace(study.policy, webhooks=(receiver.url,), **overrides), secret="shared")


def test_signature_matches_specification_example() -> None:
    headers = signature_headers(
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        1614265330,
        b'{"test": 2432232314}',
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    )
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_promotions_and_rollbacks_are_posted_once_and_signed(study: FinishedStudy, receiver: Receiver) -> None:
    promote(**arguments_with_webhook(study, receiver), reason="first")
    promote(**arguments_with_webhook(study, receiver))
    promote(**arguments_with_webhook(study, receiver, aliases=BEST))
    rollback(
        reference(study, "@champion"),
        "bad",
        webhooks=Webhooks(urls=(receiver.url,), secret="shared"),
        tracking_uri=study.uri,
    )
    messages = receiver.bodies()
    assert [body["type"] for body in messages] == ["edgeopt.promotion", "edgeopt.promotion", "edgeopt.rollback"]
    assert [body["data"]["moves"] for body in messages] == [
        [{"alias": "champion", "from": None, "to": "3"}],
        [{"alias": "champion", "from": "3", "to": "1"}],
        [{"alias": "champion", "from": "1", "to": "3"}],
    ]
    assert messages[0]["data"]["reason"] == "first"
    moved_digests = [e.digest for e in audit(study.policy.model, tracking_uri=study.uri).entries if e.kind == "moved"]
    assert [headers["webhook-id"] for headers, _ in receiver.requests] == moved_digests
    for headers, body in receiver.requests:
        content = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        expected = base64.b64encode(hmac.new(b"shared", content, hashlib.sha256).digest()).decode()
        assert headers["webhook-signature"] == f"v1,{expected}"


def test_retried_message_keeps_its_id(study: FinishedStudy, receiver: Receiver) -> None:
    receiver.codes = [503, 429]
    promote(**arguments_with_webhook(study, receiver))
    assert len({headers["webhook-id"] for headers, _ in receiver.requests}) == 1
    assert len(receiver.requests) == 3


def test_undelivered_message_is_posted_before_the_next(study: FinishedStudy, receiver: Receiver) -> None:
    receiver.codes = [400]
    with pytest.raises(
        TrackingError, match=r"the operation is complete, but a webhook could not be notified .*HTTP 400"
    ):
        promote(**arguments_with_webhook(study, receiver))
    assert aliases(study) == {"champion": "3"}
    assert len(receiver.requests) == 1, "a rejected message is not retried at once"
    promote(**arguments_with_webhook(study, receiver, aliases=BEST))
    assert [body["data"]["moves"][0]["to"] for body in receiver.bodies()] == ["3", "3", "1"]
    assert audit(study.policy.model, tracking_uri=study.uri).problems == ()


def test_unreachable_webhook_does_not_undo_promotion(study: FinishedStudy, receiver: Receiver) -> None:
    unreachable = replace(receiver, url="http://127.0.0.1:9/hook")
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1:9/hook: ConnectionError"):
        promote(**arguments_with_webhook(study, unreachable))
    assert aliases(study) == {"champion": "3"}


def test_missing_secret_prevents_promotion(study: FinishedStudy, receiver: Receiver) -> None:
    with pytest.raises(ConfigError, match="EDGEOPT_WEBHOOK_SECRET"):
        promote(**arguments_with_webhook(study, receiver) | {"secret": ""})
    assert audit(study.policy.model, tracking_uri=study.uri).entries == ()
    assert receiver.requests == []
