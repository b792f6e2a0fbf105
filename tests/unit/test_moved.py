"""Names of version 0.1.0 that recipes, manifests and scripts may hold: each leads to what it led to."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import nemo_bard
from nemo_bard.base import moved
from nemo_bard.base.registry import import_dotted

OLD_MODULES = [
    "adapters",
    "attention",
    "batch",
    "calibrate",
    "checkpoint",
    "chunked",
    "cli",
    "collate",
    "commands",
    "configuration",
    "console",
    "data",
    "decode",
    "demo",
    "digits",
    "doctor",
    "evaluate",
    "export",
    "generation",
    "launch",
    "layout",
    "lean",
    "lengths",
    "losses",
    "model",
    "noise",
    "packing",
    "paths",
    "pipeline",
    "plan",
    "prompt",
    "recipe_file",
    "report",
    "responder",
    "sampling",
    "shapes",
    "slurm",
    "tiny",
    "train",
    "video",
    "visualize",
    "visualize_gif",
    "visualize_page",
    "visualize_picture",
    "_registration",
    "_startup",
    "commands.calibrate",
    "commands.convert",
    "commands.doctor",
    "commands.evaluate",
    "commands.finetune",
    "commands.generate",
    "commands.merge",
    "commands.plan",
    "commands.status",
    "pipeline.checks",
    "pipeline.compose",
    "pipeline.evaluation",
    "pipeline.manifest",
    "pipeline.plan",
    "pipeline.run",
    "pipeline.status",
    "pipeline.training",
    "pipeline.world",
    "train.corruption",
    "train.cpu_compat",
    "train.flops",
    "train.joint",
    "train.masks",
    "train.packed_loader",
    "train.pbm",
    "train.recipe_config",
    "train.swd",
]
"""Every module of 0.1.0 that is not gone on purpose."""
OLD_NAMES = [
    "adapters.merge",
    "attention.bard_attention",
    "calibrate.calibrate",
    "calibrate.Goal",
    "checkpoint.check_checkpoint",
    "chunked.OutputHead",
    "chunked.chunked_loss",
    "cli.automodel",
    "cli.main",
    "cli.run_command",
    "collate.BlockDiffusionCollator",
    "collate.TrainingSample",
    "configuration.BardGenerationConfig",
    "configuration.BardVLConfig",
    "data.JsonlDataset",
    "data.MediaSource",
    "data.make_jsonl",
    "data.parse_record",
    "data.split_last_response",
    "data.ROLES",
    "decode.Decoder",
    "demo.main",
    "digits.DigitsDataset",
    "digits.make_digits",
    "digits.score",
    "evaluate.accuracy",
    "evaluate.edit_distance",
    "evaluate.evaluate",
    "evaluate.exact_match",
    "export.convert",
    "generation.BardGenerateOutput",
    "launch.EXIT_PREEMPTED",
    "launch.LAUNCHERS",
    "launch.run_torchrun",
    "launch.under_torchrun",
    "layout.attention_mask",
    "layout.find_responses",
    "layout.sample_layout",
    "losses.BlockDiffusionCrossEntropy",
    "losses.BlockDiffusionLoss",
    "losses.DistillationLoss",
    "losses.MixturePathKL",
    "model.BardVLForConditionalGeneration",
    "model.check_checkpoint_folder",
    "noise.MaskNoise",
    "noise.MixedNoise",
    "noise.UniformNoise",
    "packing.PackedDataset",
    "packing.pack_dataset",
    "paths.find_recipe",
    "paths.recipes_dir",
    "pipeline.Pipeline",
    "pipeline.run.Pipeline",
    "plan.make_plan",
    "plan.PlanSettings",
    "plan.training_flops",
    "recipe_file.load_config",
    "recipe_file.load_raw_config",
    "report.markdown_table",
    "report.read_run",
    "report.write_report",
    "responder.load_checkpoint",
    "responder.make_responder",
    "shapes.make_config",
    "tiny.make_tiny_qwen3_vl",
    "train.pbm.PBMRecipe",
    "train.swd.SWDRecipe",
    "video.read_video",
    "visualize.make_trace",
    "visualize.write_visualization",
    "visualize_gif.write_gif",
    "visualize_page.render_page",
]
"""What a recipe's YAML, or a script, of 0.1.0 could hold."""
RECIPES_OF_0_1_0 = {
    "collate.BlockDiffusionCollator": "data.BlockDiffusionCollator",
    "data.JsonlDataset": "data.jsonl.JsonlDataset",
    "digits.make_digits": "data.make_digits",
    "losses.BlockDiffusionCrossEntropy": "method.BlockDiffusionCrossEntropy",
    "losses.DistillationLoss": "method.DistillationLoss",
    "pipeline.Pipeline": "pipeline.run.Pipeline",
    "train.pbm.PBMRecipe": "train.pbm.PBMRecipe",
    "train.swd.SWDRecipe": "train.swd.SWDRecipe",
}
"""Dotted names in the recipes and ``conf/`` that were shipped with 0.1.0 -> the same thing today."""


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


@pytest.mark.parametrize("old", OLD_MODULES)
def test_every_module_of_0_1_0_is_found(old):
    module = importlib.import_module(f"nemo_bard.{old}")
    assert module is importlib.import_module(moved.new_name(f"nemo_bard.{old}")), "one module, not a copy"


@pytest.mark.parametrize("old", OLD_NAMES)
def test_every_public_name_of_0_1_0_is_found(old):
    thing = import_dotted(f"nemo_bard.{old}")
    assert getattr(thing, "__module__", "nemo_bard").startswith("nemo_bard")


@pytest.mark.parametrize("old", RECIPES_OF_0_1_0)
def test_names_in_shipped_recipes_of_0_1_0_mean_the_same(old):
    assert import_dotted(f"nemo_bard.{old}") is import_dotted(f"nemo_bard.{RECIPES_OF_0_1_0[old]}")


@pytest.mark.parametrize("old", moved.MODULES)
def test_the_table_leads_to_modules_and_hides_none(old):
    assert importlib.util.find_spec(f"nemo_bard.{moved.MODULES[old]}") is not None
    path = Path(nemo_bard.__file__).parent.joinpath(*old.split("."))
    assert not path.with_suffix(".py").exists()
    assert not (path / "__init__.py").exists()


@pytest.mark.parametrize(("package", "name"), [(p, name) for p, names in moved.EXPORTS.items() for name in names])
def test_packages_still_give_what_the_module_of_their_name_held(package, name):
    getattr(importlib.import_module(f"nemo_bard.{package}"), name)


def test_what_never_was_is_not_found():
    import nemo_bard.report

    with pytest.raises(AttributeError, match="module 'nemo_bard.report' has no attribute 'nothing'"):
        nemo_bard.report.nothing  # noqa: B018
    with pytest.raises(ModuleNotFoundError, match=re.escape("nemo_bard.nothing")):
        importlib.import_module("nemo_bard.nothing")


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import nemo_bard.losses, nemo_bard.losses", 1),
        ("from nemo_bard.losses import BlockDiffusionLoss\nimport nemo_bard.losses", 1),
        ("from nemo_bard.data import ROLES\nfrom nemo_bard.data import ROLES", 1),
        ("from nemo_bard.commands import plan", 1),
        ("import nemo_bard._startup, nemo_bard._registration", 0),
        ("from nemo_bard.method import BlockDiffusionLoss\nfrom nemo_bard.data import JsonlDataset", 0),
    ],
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_old_name_is_told_once_and_on_one_rank(code, told, rank):
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, "RANK": rank},
    )
    lines = [line for line in done.stderr.splitlines() if "FutureWarning" in line and "nemo_bard" in line]
    assert len(lines) == (told if rank == "0" else 0), done.stderr
    assert all("is now nemo_bard." in line and "goes on working" in line for line in lines)


@pytest.mark.parametrize("module", ["tiny", "demo", "cli"])
def test_modules_that_are_run_by_name(module):
    done = subprocess.run(
        [sys.executable, "-m", f"nemo_bard.{module}", "--help"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    assert ("FutureWarning" in done.stderr) == (module in moved.MODULES)
