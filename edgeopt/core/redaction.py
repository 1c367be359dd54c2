"""What must not be shown."""

from __future__ import annotations

import re
from urllib.parse import urlsplit


def redact_password(url: str) -> str:
    """`url` for messages and records."""
    location = urlsplit(url).netloc
    user, _, host = location.rpartition("@")
    if ":" in user:
        url = url.replace(location, f"{user.partition(':')[0]}:***@{host}", 1)
    return re.sub(r"([?&]password=)[^&]*", r"\1***", url)
