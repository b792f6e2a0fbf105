"""Data sets of other packages as ours are: every sample has a number, and what is known of it tells it from others."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sized
from typing import Any, cast

import numpy as np

from nemo_bard.data.stream import identity_of

_TOLD_APART = 256
"""Samples whose texts are part of the identity of a list."""


class NumberedSamples:
    """A data set whose samples have a ``sample_index``, their place, where they have none; everything else is its own.

    Noise is drawn from that number. Data sets of NeMo AutoModel have none, nor need those of users.

    Args:
        dataset: Sized and map-style; its items are dictionaries with ``conversation``.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """Return an item with its number."""
        return self._with_number(self.dataset[index], index)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # being unpickled
            raise AttributeError(name)
        own = getattr(self.dataset, name)
        if name != "peek":
            return own
        return lambda index: self._with_number(own(index), index)

    def describe(self, index: int) -> dict[str, Any]:
        """Where a sample comes from: what the data set says, else the name of its class."""
        own = self.dataset.describe(index) if hasattr(self.dataset, "describe") else {}
        return {"source": type(self.dataset).__name__, **own}

    def identity(self) -> dict[str, str]:
        """What the samples depend on; of a list, its texts, as far as they can be told apart quickly."""
        known = identity_of(self.dataset)
        if isinstance(self.dataset, list) and not hasattr(self.dataset, "identity"):
            digest = hashlib.sha256()
            for index in np.linspace(0, len(self) - 1, min(len(self), _TOLD_APART), dtype=np.int64):
                digest.update(_texts(self.dataset[int(index)]).encode(errors="surrogatepass"))
            known["content"] = f"list, {digest.hexdigest()[:16]}"
        return known

    @staticmethod
    def _with_number(item: Any, index: int) -> Any:
        if isinstance(item, Mapping) and "conversation" in item and "sample_index" not in item:
            return {**item, "sample_index": int(index)}
        return item


def numbered(dataset: Any) -> Any:
    """A data set whose samples have numbers; ours have, and stay as they are."""
    if type(dataset).__module__.startswith("nemo_bard."):
        return dataset
    return NumberedSamples(cast("Sized", dataset))


def _texts(item: Any) -> str:
    """The texts of a conversation, its images left out."""
    turns = item.get("conversation", ()) if isinstance(item, Mapping) else ()
    found = []
    for turn in turns:
        content = turn.get("content") if isinstance(turn, Mapping) else None
        parts = content if isinstance(content, list) else [{"text": content}]
        found += [str(turn.get("role")), *(str(part.get("text")) for part in parts if isinstance(part, Mapping))]
    return "\0".join(found)
