from __future__ import annotations

import pytest

from edgeopt.core.redaction import redact_password


@pytest.mark.parametrize(
    ("url", "redacted"),
    [
        ("postgresql://ada:s3cret@host/db", "postgresql://ada:***@host/db"),
        ("postgresql+psycopg://ada:s3@cr:et@host:5432/db", "postgresql+psycopg://ada:***@host:5432/db"),
        ("https://:s3cret@host", "https://:***@host"),
        ("postgresql://host/db?user=ada&password=s3cret&x=1", "postgresql://host/db?user=ada&password=***&x=1"),
        ("http://ada@host:5000", "http://ada@host:5000"),
        ("sqlite:////tmp/a:b@c.db", "sqlite:////tmp/a:b@c.db"),
        ("", ""),
    ],
)
def test_only_passwords_are_redacted(url: str, redacted: str) -> None:
    assert redact_password(url) == redacted
