"""A chain's run folder with LoRA stages as training leaves it, of random adapters and without training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from nemo_bard.checkpoints.merge import merge
from nemo_bard.generation.adapter_folders import KEY

PROJECTIONS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


class LoraRun:
    """Adds stages to a run folder.

    Args:
        folder: The run's; ``start/export`` is a copy of ``start``.
        start: A BARD start point.
    """

    def __init__(self, folder: Path, start: Path) -> None:
        self.folder, self.stages = folder, []
        folder.mkdir(parents=True)
        shutil.copytree(start, folder / "start" / "export")
        self._finish("start", {"kind": "convert"}, {})

    def add(self, name, *, block_size, rank=4, alpha=8, projections=PROJECTIONS, seed=0, peft=True, **fields):
        """A finished stage that began with the last one; returns its folder."""
        before, stage = self.folder / self.stages[-1] / "export", self.folder / name
        checkpoint = stage / "checkpoints" / "epoch_0_step_1"
        (checkpoint / "model").mkdir(parents=True)
        recipe = {
            "recipe": "nemo_bard.train.pbm.PBMRecipe",
            "model": {"pretrained_model_name_or_path": str(before), "block_size": block_size, **fields},
            "peft": {"dim": rank} if peft else None,
        }
        for place in (checkpoint / "config.yaml", stage / "stage.yaml"):
            place.write_text(yaml.safe_dump(recipe))
        modules = adapt(checkpoint / "model", before, rank=rank, alpha=alpha, projections=projections, seed=seed)
        assert modules
        merge(checkpoint / "model", stage / "export", base=before)
        self._finish(name, {"kind": "recipe", "block_size": block_size}, {"init": {"content": self.stages[-1]}})
        return stage

    def _finish(self, name, config, inputs):
        self.stages.append(name)
        record = {"stage": name, "export": f"{name}/export", "content": name, "config": config, "inputs": inputs}
        (self.folder / name / "manifest.json").write_text(json.dumps(record))
        (self.folder / name / "started.json").write_text(json.dumps(record))
        (self.folder / "pipeline.json").write_text(json.dumps({"name": "lora", "stages": self.stages}))


def adapt(folder, base, *, rank, alpha, projections, seed):
    """Write random adapters for layers of a checkpoint, in the format of Hugging Face PEFT; returns the layers' names."""
    generator, tensors, modules = torch.Generator().manual_seed(seed), {}, []
    with safe_open(base / "model.safetensors", "pt") as weights:
        for name in sorted(weights.keys()):
            module = name.removesuffix(".weight")
            if not module.endswith(projections) or "language_model" not in module:
                continue
            out, width = weights.get_slice(name).get_shape()
            modules.append(module)
            for part, shape in (("A", (rank, width)), ("B", (out, rank))):
                tensors[KEY.format(module=module, part=part)] = torch.randn(*shape, generator=generator) / 8
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": modules,
        "base_model_name_or_path": str(base),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return modules
