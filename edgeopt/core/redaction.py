"""Remove secrets from text that is shown or recorded."""

from __future__ import annotations

import re
from urllib.parse import urlsplit


def redact_password(url: str) -> str:
    """Replace passwords in a URL by `***`, in the user part and in the query."""
    location = urlsplit(url).netloc
    user, _, host = location.rpartition("@")
    if ":" in user:
        url = url.replace(location, f"{user.partition(':')[0]}:***@{host}", 1)
    return re.sub(r"([?&]password=)[^&]*", r"\1***", url)
