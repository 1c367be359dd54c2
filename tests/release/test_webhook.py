"""Messages of moved aliases: genuine, in order, sent again until they are taken."""

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
from edgeopt.release.webhook import Webhooks, signed

from .conftest import Desk
from .test_release import BEST, aliases, at


@dataclass
class Receiver:
    """Answers with the given codes in turn, then with 200; keeps what it was sent."""

    url: str
    codes: list[int] = field(default_factory=list)
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.got]


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.setattr(webhook, "PAUSES_S", (0.0, 0.0, 0.0))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            known.got.append(({k.lower(): v for k, v in self.headers.items()}, body))
            self.send_response(known.codes.pop(0) if known.codes else 200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    known = Receiver(url=f"http://127.0.0.1:{server.server_port}/hook")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield known
    server.shutdown()


def telling(desk: Desk, receiver: Receiver, **changed: Any) -> dict[str, Any]:
    return desk.arguments(policy=replace(desk.policy, webhooks=(receiver.url,), **changed), secret="shared")


def test_the_signature_is_that_of_the_specification() -> None:
    headers = signed(
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        1614265330,
        b'{"test": 2432232314}',
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    )
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_promotions_and_rollbacks_are_told_once_and_genuinely(desk: Desk, receiver: Receiver) -> None:
    promote(**telling(desk, receiver), reason="first")
    promote(**telling(desk, receiver))
    promote(**telling(desk, receiver, aliases=BEST))
    rollback(
        at(desk, "@champion"), "bad", webhooks=Webhooks(urls=(receiver.url,), secret="shared"), tracking_uri=desk.uri
    )
    told = receiver.bodies()
    assert [body["type"] for body in told] == ["edgeopt.promotion", "edgeopt.promotion", "edgeopt.rollback"]
    assert [body["data"]["moves"] for body in told] == [
        [{"alias": "champion", "from": None, "to": "3"}],
        [{"alias": "champion", "from": "3", "to": "1"}],
        [{"alias": "champion", "from": "1", "to": "3"}],
    ]
    assert told[0]["data"]["reason"] == "first"
    moved = [e.digest for e in audit(desk.policy.model, tracking_uri=desk.uri).entries if e.kind == "moved"]
    assert [headers["webhook-id"] for headers, _ in receiver.got] == moved
    for headers, body in receiver.got:
        content = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        expected = base64.b64encode(hmac.new(b"shared", content, hashlib.sha256).digest()).decode()
        assert headers["webhook-signature"] == f"v1,{expected}"


def test_a_receiver_that_stumbles_is_told_again_under_the_same_id(desk: Desk, receiver: Receiver) -> None:
    receiver.codes = [503, 429]
    promote(**telling(desk, receiver))
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1
    assert len(receiver.got) == 3


def test_what_was_not_taken_is_sent_before_the_next_message(desk: Desk, receiver: Receiver) -> None:
    receiver.codes = [400]
    with pytest.raises(TrackingError, match=r"all is done, but a webhook could not be told .*HTTP 400"):
        promote(**telling(desk, receiver))
    assert aliases(desk) == {"champion": "3"}
    assert len(receiver.got) == 1, "a refusal is not asked again at once"
    promote(**telling(desk, receiver, aliases=BEST))
    assert [body["data"]["moves"][0]["to"] for body in receiver.bodies()] == ["3", "3", "1"]
    assert audit(desk.policy.model, tracking_uri=desk.uri).faults == ()


def test_an_address_that_nobody_answers_changes_nothing_else(desk: Desk, receiver: Receiver) -> None:
    nobody = replace(receiver, url="http://127.0.0.1:9/hook")
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1:9/hook: ConnectionError"):
        promote(**telling(desk, nobody))
    assert aliases(desk) == {"champion": "3"}


def test_without_a_secret_nothing_begins(desk: Desk, receiver: Receiver) -> None:
    with pytest.raises(ConfigError, match="EDGEOPT_WEBHOOK_SECRET"):
        promote(**telling(desk, receiver) | {"secret": ""})
    assert audit(desk.policy.model, tracking_uri=desk.uri).entries == ()
    assert receiver.got == []
