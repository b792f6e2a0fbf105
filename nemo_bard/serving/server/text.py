"""Response ids to text, block by block: what can be said already, where stop strings cut, what tokens it took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"
"""What decoding gives for a character of which bytes are still missing."""


class ResponseText:
    """The text of a growing response.

    Args:
        tokenizer: The model's.
        stop: Strings that end the response; they are not part of it.
        skip_special_tokens: Whether special tokens, such as the end's, are left out.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), *, skip_special_tokens: bool = True) -> None:
        self.tokenizer, self.stop, self.skip = tokenizer, list(stop), skip_special_tokens
        self.ids: list[int] = []
        self.text = ""
        """What was handed out."""
        self.stopped_by: str | None = None

    @property
    def num_tokens(self) -> int:
        """Response tokens, the end token included; after a stop string those that it took to write it."""
        return len(self.ids)

    def add(self, ids: Sequence[int]) -> str:
        """Take the tokens of a block; returns the text that is certain now and was not handed out before."""
        if self.stopped_by is not None:
            return ""
        before = len(self.ids)
        self.ids += ids
        text = self._decode(self.ids)
        if (cut := self._cut(text)) is not None:
            self.ids = self.ids[: self._tokens_to_stop(before)]
            return self._say(text[:cut])
        return self._say(text[: len(text) - self._held(text)])

    def finish(self) -> str:
        """What was held back, now that nothing more comes."""
        return "" if self.stopped_by is not None else self._say(self._decode(self.ids))

    def _say(self, text: str) -> str:
        new = text[len(self.text) :]
        self.text += new
        return new

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=self.skip)

    def _cut(self, text: str) -> int | None:
        """Where the first stop string begins."""
        found = [(place, one) for one in self.stop if (place := text.find(one)) >= 0]
        if not found:
            return None
        place, self.stopped_by = min(found)
        return place

    def _tokens_to_stop(self, before: int) -> int:
        for count in range(before + 1, len(self.ids)):
            if any(one in self._decode(self.ids[:count]) for one in self.stop):
                return count
        return len(self.ids)

    def _held(self, text: str) -> int:
        """Characters at the end that later tokens may change, or that may begin a stop string."""
        held = len(text) - len(text.rstrip(UNFINISHED))
        for one in self.stop:
            held = max(held, next((n for n in range(len(one) - 1, 0, -1) if text.endswith(one[:n])), 0))
        return held
