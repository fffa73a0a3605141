"""Answers of equal length: a tokenizer in which no token ends an answer."""

from __future__ import annotations

from typing import Any


class EndlessTokenizer:
    """A tokenizer without an end of sequence; all else is that of the one it stands for."""

    eos_token_id = -1  # no token has this number

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._tokenizer(*arguments, **named)
