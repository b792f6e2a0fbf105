"""``export --adapter``: the LoRA stages of a chain as adapters in the folder of their frozen base."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_bard.base.errors import short
from nemo_bard.base.folders import CONFIG, read_object
from nemo_bard.base.metrics import markdown_table
from nemo_bard.checkpoints.convert import check_loads
from nemo_bard.checkpoints.exporting import places
from nemo_bard.checkpoints.exporting.base_model import CARD
from nemo_bard.checkpoints.exporting.chains import Chain, find_chains, summed, trained_fields
from nemo_bard.checkpoints.exporting.export import GENERATION_CONFIG, ExportReport, export, write_object
from nemo_bard.checkpoints.exporting.facts import KINDS, calibration_folder, read_facts
from nemo_bard.generation.adapter_folders import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    FACTS,
    FOLDER,
    KEY,
    weights_digest,
)

DIFFUSION = (KINDS["PBMRecipe"], KINDS["SWDRecipe"])
"""Kinds of stages after which a model decodes by block diffusion."""


def export_adapters(
    source: Path,
    target: Path,
    *,
    stages: Sequence[str] = (),
    base: Path | None = None,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    self_contained: bool = False,
    overwrite: bool = False,
) -> ExportReport:
    """Write the base of LoRA stages with an adapter for each in ``adapters/NAME``; it appears whole or not at all.

    The name is ``b`` and the block size, or the stage's where two have the same size. An adapter is the sum of those of all
    LoRA stages up to its own. Without one the folder decodes as the base does: token by token, unless the base was itself
    trained for block diffusion.

    Args:
        source: A chain's run folder, a stage, or a LoRA checkpoint of a training run.
        target: Folder to make.
        stages: Of a run folder; all finished LoRA stages if there are none.
        base: What the first LoRA stage began with; None takes what the run says.
        dtype: See ``export``; of the base, adapters are in float32.
        max_shard_size: See ``export``.
        self_contained: See ``export``.
        overwrite: See ``export``.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: As ``export``, or if adapters are gone.
        FileExistsError: If ``target`` exists and may not be replaced.
        ValueError: As ``export``; or if a stage was trained without adapters, or stages have different bases or differ in
            what the folder has once.
    """
    source, target = Path(source), Path(target)
    if source.resolve() in target.resolve().parents:
        raise ValueError(f"{target}: DST must not lie inside SRC")
    chains = dict(zip(_names(found := find_chains(source, stages, base)), found, strict=True))
    fields = _common_fields(chains)
    return export(
        found[0].base,
        target,
        dtype=dtype,
        max_shard_size=max_shard_size,
        self_contained=self_contained,
        overwrite=overwrite,
        finish=lambda folder: _add(folder, chains, fields),
    )


def _names(chains: Sequence[Chain]) -> list[str]:
    sizes = [_block_size(chain) for chain in chains]
    twice = {size for size, count in Counter(sizes).items() if count > 1}
    return [chain.last.name if size in twice else f"b{size}" for chain, size in zip(chains, sizes, strict=True)]


def _block_size(chain: Chain) -> int:
    size = trained_fields(chain).get("block_size")
    if size is None:
        raise ValueError(f"{chain.last.adapters.folder}: neither its recipe nor its base says a block_size")
    return size


def _common_fields(chains: dict[str, Chain]) -> dict[str, Any]:
    """Fields of ``config.json`` that all stages were trained with."""
    first, *others = chains.values()
    fields = {key: value for key, value in trained_fields(first).items() if key != "block_size"}
    for chain in others:
        theirs = trained_fields(chain)
        for key in sorted(fields.keys() | theirs.keys() - {"block_size"}):
            if fields.get(key) != theirs.get(key):
                raise ValueError(
                    f"stage {chain.last.name} was trained with {key}={short(theirs.get(key))}, stage {first.last.name} with"
                    f" {short(fields.get(key))}; a folder has one, choose with --stage"
                )
    return fields


def _add(folder: Path, chains: dict[str, Chain], fields: dict[str, Any]) -> list[str]:
    """Add everything to the base's folder."""
    config = {**read_object(folder / CONFIG), **fields}
    write_object(folder / CONFIG, config)
    check_loads(folder)
    base = next(iter(chains.values())).base
    facts = read_facts(places.with_run(places.FOLDER, base))
    made_for = {"name": facts.base_model or _name_of(base), "digest": weights_digest(folder)}
    rows = []
    for name, chain in chains.items():
        rank = _write(folder / FOLDER / name, chain, made_for, fields)
        rows.append((name, chain.last.name, _block_size(chain), rank))
    notes = [f"adapter {name}: B = {size}, rank {rank}, from stage {stage}" for name, stage, size, rank in rows]
    is_trained = any(stage.kind in DIFFUSION for stage in facts.stages)
    if not is_trained:
        _decode_token_by_token(folder)
        causal = config.get("context_attention") == "causal"
        notes.append(f"without an adapter: {'token by token, as the base' if causal else 'refused'}")
    _write_card(folder, rows)
    return notes


def _name_of(base: Path) -> str:
    place = places.with_run(places.FOLDER, base)
    if place.stage is None or place.run is None:
        return base.resolve().name
    return f"stage {place.stage.name} of {place.run.name}"


def _decode_token_by_token(folder: Path) -> None:
    from nemo_bard.generation.settings import BardGenerationConfig

    config = BardGenerationConfig.from_generation_config(BardGenerationConfig.from_pretrained(folder))
    config.updated(remasking_strategy="autoregressive").save_pretrained(folder)


def _write(place: Path, chain: Chain, made_for: dict[str, str], fields: dict[str, Any]) -> int:
    """Write an adapter; returns its rank."""
    from safetensors.torch import save_file

    place.mkdir(parents=True)
    layers, size = summed(chain.links), _block_size(chain)
    rank = len(next(iter(layers.values()))[0])
    tensors = {}
    for module, (down, up) in layers.items():
        tensors[KEY.format(module=module, part="A")] = down.contiguous()
        tensors[KEY.format(module=module, part="B")] = up.contiguous()
    save_file(tensors, place / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (place / ADAPTER_WEIGHTS).chmod(0o644)
    template = read_object(chain.last.adapters.folder / ADAPTER_CONFIG)
    config = {
        **template,
        "base_model_name_or_path": "../..",
        "r": rank,
        "lora_alpha": rank,  # scales are in the weights
        "target_modules": sorted(layers),
    }
    write_object(place / ADAPTER_CONFIG, config)
    facts = {
        "block_size": size,
        "stages": [link.name for link in chain.links],
        "model": {**fields, "block_size": size},
        "base": made_for,
    }
    write_object(place / FACTS, facts)
    _write_settings(place, chain, size)
    return rank


def _write_settings(place: Path, chain: Chain, block_size: int) -> None:
    """Write the ``generation_config.json`` of an adapter: a calibration's, the stage's own, or BARD's defaults."""
    from nemo_bard.generation.settings import BardGenerationConfig

    last = chain.last.place
    found = [folder for folder in (calibration_folder(last), last.folder, chain.base) if folder is not None]
    for folder in found:
        if (folder / GENERATION_CONFIG).is_file():
            config = BardGenerationConfig.from_generation_config(BardGenerationConfig.from_pretrained(folder))
            config.updated(block_size=config.block_size or block_size, adapter=None).save_pretrained(place)
            return
    BardGenerationConfig(block_size=block_size).save_pretrained(place)


def _write_card(folder: Path, rows: list[tuple[str, str, int, int]]) -> None:
    """Add the adapters to the model card."""
    table = markdown_table(
        ("adapter", "stage", "block size", "rank"),
        [(f"`{name}`", stage, str(size), str(rank)) for name, stage, size, rank in rows],
    )
    file = folder / CARD
    text = (
        "\n## Adapters\n"
        "The weights are those that training began with. What each stage learnt lies beside them as a LoRA adapter, in"
        f" `{FOLDER}/`.\n\n{table}\n\n"
        f'```python\nids = model.generate(batch, adapter="{rows[-1][0]}")\n```\n'
    )
    file.write_text(file.read_text(encoding="utf-8") + text, encoding="utf-8")
