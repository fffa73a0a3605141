"""The text of one answer while its tokens come, in pieces that are never taken back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what the first bytes of a character decode to


class Writing:
    """One answer's text. All pieces together are what `rlhf_core.generation` makes of the same tokens, cut
    before the first stop sequence.

    Held back until more is known: bytes of an unfinished character, white space that may be the end, and what
    may be the beginning of a stop sequence.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids: list[int] = []
        self._shown = ""
        self.stopped = False  # by a stop sequence

    @property
    def tokens(self) -> int:
        return len(self._ids)

    def add(self, token: int) -> str:
        """The piece that is certain now, often empty."""
        self._ids.append(token)
        text = self._cut(self._decode())
        return self._show(text if self.stopped else self._certain(text))

    def end(self) -> str:
        """The rest, when no token follows."""
        return self._show(self._cut(self._decode()), last=True)

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _cut(self, text: str) -> str:
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        self.stopped = self.stopped or bool(found)
        return text[: min(found)] if found else text

    def _certain(self, text: str) -> str:
        text = text.rstrip(UNFINISHED)
        return text[: len(text) - max((_begun(text, stop) for stop in self._stops), default=0)]

    def _show(self, text: str, *, last: bool = False) -> str:
        text = text.strip()
        if not text.startswith(self._shown) and not last:
            return ""  # a tokenizer that writes earlier text anew: wait for what it settles on
        piece = text[len(self._shown) :]
        self._shown += piece
        return piece


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
