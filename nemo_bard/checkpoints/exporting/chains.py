"""LoRA stages of a chain, seen from what the first of them began with.

Each stage of a chain starts from the merged weights of the stage before, so its adapter alone says little. Adapters add up,
though: those of all stages up to one, their ranks put side by side, are one adapter on what the first of them began with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from nemo_bard.base.folders import CONFIG, read_object
from nemo_bard.checkpoints.exporting import places
from nemo_bard.checkpoints.exporting.facts import began_with
from nemo_bard.checkpoints.exporting.places import Place
from nemo_bard.checkpoints.exporting.weights import FolderWeights
from nemo_bard.checkpoints.merge import CONFIG_OVERRIDES, Adapters, read_adapters
from nemo_bard.generation.adapter_folders import ADAPTER_WEIGHTS, KEY

TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""How far a sum may be from the merged weights that the run wrote, as a part of their largest number."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """A LoRA stage of a chain."""

    place: Place
    adapters: Adapters

    @property
    def name(self) -> str:
        """The stage's, else that of the folder around its checkpoints."""
        where = self.place.stage or (self.place.metrics or self.place.folder)
        return where.name


@dataclass(frozen=True, kw_only=True)
class Chain:
    """LoRA stages that follow on one base, up to the one that is wanted."""

    base: Path
    links: tuple[Link, ...]

    @property
    def last(self) -> Link:
        """The wanted one."""
        return self.links[-1]


def find_chains(source: Path, stages: Sequence[str] = (), base: Path | None = None) -> list[Chain]:
    """Find LoRA stages, and what leads to each.

    Args:
        source: A chain's run folder, a stage, or a LoRA checkpoint of a training run.
        stages: Names, of a run folder; all finished LoRA stages if there are none.
        base: What the first LoRA stage began with, where the run does not say or it lies elsewhere now.

    Returns:
        One for each wanted stage, in the order of the run.

    Raises:
        FileNotFoundError: If a checkpoint is missing.
        ValueError: If a stage was trained without adapters, their checkpoint is gone, or two have different bases.
    """
    if stages or not (source / places.IDENTITY).is_file():
        names: Sequence[str | None] = list(dict.fromkeys(stages)) or [None]
        found = [places.find(source, name) for name in names]
    else:
        found = [
            places.find(source, name)
            for name, folder in places.stage_folders(source).items()
            if (folder / places.MANIFEST).is_file()
        ]
        found = [place for place in found if adapters_of(place) is not None]
        if not found:
            raise ValueError(f"{source}: no finished stage was trained with adapters (peft); leave out --adapter")
    chains = [_chain(place, base) for place in found]
    for chain in chains[1:]:
        if chain.base.resolve() != chains[0].base.resolve():
            first = chains[0]
            raise ValueError(
                f"stage {chain.last.name} is on {chain.base} and stage {first.last.name} on {first.base}; adapters of one"
                " folder have one base, choose with --stage"
            )
    return chains


def adapters_of(place: Place) -> Adapters | None:
    """The adapters that training left for a checkpoint, None if it was trained without.

    Raises:
        FileNotFoundError: If it was trained with adapters, and they are gone.
    """
    checkpoint = place.checkpoint
    if checkpoint is None and place.stage is not None and (place.stage / "checkpoints").is_dir():
        checkpoint = places.latest_checkpoint(place.stage / "checkpoints")
    if checkpoint is not None and (checkpoint / "model" / places.ADAPTER_CONFIG).is_file():
        return read_adapters(checkpoint / "model")
    if place.kind == places.ADAPTERS:
        return read_adapters(place.folder)
    recipe = None if place.stage is None else place.stage / places.STAGE_YAML
    if recipe is not None and recipe.is_file():
        import yaml

        if (yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}).get("peft"):
            raise FileNotFoundError(f"{place.stage}: was trained with adapters, and no checkpoint there has them")
    return None


def _chain(place: Place, base: Path | None) -> Chain:
    links: list[Link] = []
    here, folder = place, place.folder
    while (adapters := adapters_of(here)) is not None:
        links.insert(0, Link(place=here, adapters=adapters))
        folder = Path(began_with(here) or adapters.base)
        if not (folder / CONFIG).is_file():
            break
        here = places.with_run(places.FOLDER, folder)
    if not links:
        what = place.folder if place.stage is None else f"stage {place.stage.name}"
        raise ValueError(f"{what}: was trained without adapters (peft), --adapter keeps LoRA stages; leave it out")
    if base is not None:
        folder = base
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"{links[0].adapters.folder}: its base {folder} has no {CONFIG} here; name its folder with --base"
        )
    chain = Chain(base=folder, links=tuple(links))
    _check_sum(chain)
    return chain


def _check_sum(chain: Chain) -> None:
    """Compare one layer of base and adapters with what the run has merged, where that is there."""
    merged = chain.last.place.folder
    if chain.last.place.kind != places.FOLDER:
        return
    name = chain.last.adapters.modules[0]
    base, expected = FolderWeights(chain.base), FolderWeights(merged).read(f"{name}.weight")
    if f"{name}.weight" not in base.tensors:
        raise ValueError(f"{chain.last.adapters.folder}: adapter of {name}, which {chain.base} does not have")
    weight = base.read(f"{name}.weight")
    down, up = summed(chain.links, name)[name]
    if weight.shape != (len(up), down.shape[1]) or expected.shape != weight.shape:
        raise ValueError(
            f"{chain.last.adapters.folder}: the adapter of {name} is for {(len(up), down.shape[1])}, its weight in {chain.base}"
            f" is {tuple(weight.shape)}"
        )
    off = (weight.float() + up @ down - expected.float()).abs().max() / expected.float().abs().max()
    if not off <= TOLERANCE.get(expected.dtype, math.inf):
        raise ValueError(
            f"{chain.base} and the adapters of {', '.join(link.name for link in chain.links)} do not give {merged} (layer"
            f" {name}); the base is another one, or a checkpoint is not the one that was merged"
        )


def summed(links: Sequence[Link], only: str | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """The sum of adapters as one: for each layer ``A [rank, in]`` and ``B [out, rank]`` in float32, the scales in ``B``.

    Ranks add up; where a stage has no adapter on a layer, its part is zero.

    Args:
        links: The stages.
        only: A single layer.
    """
    found: dict[str, list[tuple[Tensor, Tensor] | None]] = {}
    ranks = []
    for number, link in enumerate(links):
        with safe_open(link.adapters.folder / ADAPTER_WEIGHTS, "pt") as weights:
            for module in link.adapters.modules if only is None else {only} & set(link.adapters.modules):
                down, up = (weights.get_tensor(KEY.format(module=module, part=part)).float() for part in "AB")
                found.setdefault(module, [None] * len(links))[number] = (down, up * link.adapters.scale)
        ranks.append(read_object(link.adapters.folder / places.ADAPTER_CONFIG)["r"])
    whole = {}
    for module, parts in found.items():
        width, height = next((part[0].shape[1], part[1].shape[0]) for part in parts if part is not None)
        pairs = [
            (torch.zeros(rank, width), torch.zeros(height, rank)) if part is None else part
            for part, rank in zip(parts, ranks, strict=True)
        ]
        whole[module] = (torch.cat([down for down, _ in pairs]), torch.cat([up for _, up in pairs], 1))
    return whole


def trained_fields(chain: Chain) -> dict[str, Any]:
    """Fields of ``config.json`` as the wanted stage was trained: those of the base, with what the stage's recipe changed."""
    config = read_object(chain.base / CONFIG)
    return {key: config[key] for key in CONFIG_OVERRIDES if config.get(key) is not None} | chain.last.adapters.overrides
