"""What must not be said of an address: the user and password in a URL, and keys in its query."""

from __future__ import annotations

import re

# A password may hold an @ itself; the last one before the host's end counts.
CREDENTIALS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/\s'\"]*@")
NAMES = "api[_-]?key|key|token|access[_-]?token|password|secret|signature"
QUERY_KEY = re.compile(rf"([?&](?:{NAMES})=)[^&\s'\"]+", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """`text` for messages and logs: user and password of every URL in it replaced, and keys in its query."""
    return QUERY_KEY.sub(r"\1***", CREDENTIALS.sub(r"\1***@", text))


def holds_secret(text: str) -> bool:
    """Whether a URL in `text` carries a password or a key."""
    return without_secrets(text) != text
