"""What goes wrong in a way that a person can act on."""

from __future__ import annotations


class FeedbackError(Exception):
    """An expected failure; its text is for the person who meets it."""


class InputError(FeedbackError, ValueError):
    """What was given breaks a rule; the text names the place, the value and the rule."""


class NotAllowedError(FeedbackError):
    """This person may not do this, or not with this item."""


class ConflictError(FeedbackError):
    """It contradicts what is stored already."""


class KeyUsedError(ConflictError):
    """An idempotency key whose vote was taken back; a vote that is meant anew needs a new key."""


class StoreUnavailableError(FeedbackError):
    """The database is locked, full, read-only or away. Nothing was saved; the same may be sent again."""
