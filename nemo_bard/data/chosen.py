"""Some samples of a data set, in a chosen order: what a rehearsal trains on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_bard.data.readers import open_dataset
from nemo_bard.data.stream import identity_of


class ChosenSamples:
    """A map-style data set of samples of another one; a sample may be there several times.

    Args:
        dataset: Sized and map-style.
        indices: Its samples, in the order of this data set.

    Raises:
        ValueError: If an index is outside the data set.
    """

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, list(indices)
        outside = [index for index in self.indices if not 0 <= index < len(dataset)]
        if outside:
            raise ValueError(f"sample {outside[0]} is outside a data set of {len(dataset)} samples")

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        """Return an item.

        Raises:
            IndexError: If ``index`` is outside.
        """
        return self.dataset[self.indices[index]]

    def peek(self, index: int) -> Any:
        """The data set's own ``peek``, or an item where it has none."""
        return getattr(self.dataset, "peek", self.dataset.__getitem__)(self.indices[index])

    def describe(self, index: int) -> dict[str, Any]:
        """Where a sample comes from, as the data set says it, or its class and number."""
        if hasattr(self.dataset, "describe"):
            return self.dataset.describe(self.indices[index])
        return {"source": f"{type(self.dataset).__name__}[{self.indices[index]}]", "id": None}

    def identity(self) -> dict[str, str]:
        """What the samples depend on: the data set's own identity, and the choice."""
        return {**identity_of(self.dataset), "chosen": f"{len(self)} samples, {self._digest()[:16]}"}

    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self.indices).encode()).hexdigest()

    def fingerprint(self) -> str:
        """A text that changes with the choice, and with the data set where that can tell."""
        own = self.dataset.fingerprint() if hasattr(self.dataset, "fingerprint") else type(self.dataset).__name__
        return f"chosen {self._digest()} {own}"


def make_chosen(dataset: Mapping[str, Any], indices_file: str) -> ChosenSamples:
    """Build the data set; what a recipe names as ``dataset: {_target_: ...}``.

    Args:
        dataset: The data set to choose from, a section with ``_target_`` as in a recipe.
        indices_file: JSON list of its samples.

    Returns:
        The samples in the order of the list.

    Raises:
        ValueError: If the data set cannot be opened, or a sample is outside of it.
    """
    return ChosenSamples(open_dataset(dict(dataset)), json.loads(Path(indices_file).read_text()))
