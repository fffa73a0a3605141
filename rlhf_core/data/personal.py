"""Finding personal data in chat text: addresses, numbers, links, handles.

A filter for what people paste into a chat, not a proof that nothing is left: names and places stay.
"""

from __future__ import annotations

import re
from functools import lru_cache

PATTERNS = {
    "e-mail address": re.compile(r"[\w.+-]+\s?@\s?[\w-]+\s?\.\s?[a-z]{2,}", re.I),
    "link": re.compile(r"https?:|www\.|\b[\w-]+\.(?:com|org|net|edu|gov|io|ly|me|tv)\b", re.I),
    "phone number": re.compile(r"(?<!\d)(?:\+?\d[\s().-]*){9,}(?!\d)|\b\d{3}[\s.-]\d{4}\b"),
    "social handle": re.compile(
        r"(?<![\w@])@\w{2,}|\b(?:snapchat|snap|insta(?:gram)?|twitter|facebook|venmo|tiktok)\b\W{0,3}"
        r"(?:name|user(?:name)?|handle|id|is|:|@)",
        re.I,
    ),
}


@lru_cache(maxsize=1 << 16)  # a text often comes again: as a prompt, in a conversation, in another kind
def personal_data(text: str) -> str | None:
    """The kind of personal data found in `text`, or None."""
    for kind, pattern in PATTERNS.items():
        if pattern.search(text):
            return kind
    return None


def mask(text: str) -> str:
    """`text` with everything that `personal_data` finds replaced by its kind."""
    for kind, pattern in PATTERNS.items():
        text = pattern.sub(f"[{kind}]", text)
    return text
