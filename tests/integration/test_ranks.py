"""Four ranks train as one does, however they share the model; they hold and receive what ``nemo-bard plan`` says."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_pbm import read_log, write_mixture

from nemo_bard import BardVLConfig
from nemo_bard.base.paths import recipes_dir
from nemo_bard.checkpoints.exporting.export import export
from nemo_bard.cost.count import GPUS
from nemo_bard.train.plan import plan_of_recipe
from nemo_bard.train.recipe_file import load_raw_config

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
TOLERANCE = 3e-6
"""Of losses and gradient norms in float32, of which different orders of summation move the seventh digit."""
TRAIN = {
    "compute_dtype": "float32",
    "step_scheduler.global_batch_size": 8,
    "step_scheduler.local_batch_size": 1,
    "step_scheduler.max_steps": 2,
    "step_scheduler.ckpt_every_steps": 100,
    "dataloader.shuffle": False,
    "dataloader.collate_fn.pad_to_multiple_of": 1,
    "lr_scheduler.lr_warmup_steps": 0,
    "lr_scheduler.lr_decay_steps": 4,
    "optimizer.lr": 1e-3,
    "model.block_size": 8,
    "checkpoint.enabled": False,
}
LORA = {
    "_target_": "nemo_automodel.components._peft.lora.PeftConfig",
    "target_modules": ["*_proj"],
    "dim": 4,
    "alpha": 8,
}
CASES = {
    "plain": ("pbm", {}),
    "packed": ("pbm", {"packing.max_length": 200, "step_scheduler.global_batch_size": 4, "checkpoint.enabled": True}),
    "swd": ("swd", {}),
    "lora": ("pbm", {"peft": LORA}),
}
"""Name -> recipe and what it changes; text-only samples come in turns, so that of two ranks one never sees an image."""
NODES = {"distributed.dp_replicate_size": "auto"}
"""With two ranks per node: two replicas of two shards each."""
AT_ONCE = {"distributed.defer_fsdp_grad_sync": False}
CHECKPOINTED = {"distributed.activation_checkpointing": True}
VARIANTS = {
    "plain_2": ("plain", 2, {}),
    "plain_2_at_once": ("plain", 2, AT_ONCE),
    "plain_4": ("plain", 4, {}),
    "plain_4_bfloat16": ("plain", 4, {"compute_dtype": "bfloat16"}),
    "plain_nodes_at_once": ("plain", 4, {**NODES, **AT_ONCE}),
    "packed_nodes": ("packed", 4, {**NODES, **CHECKPOINTED}),
    "swd_nodes": ("swd", 4, NODES),
    "lora_nodes": ("lora", 4, NODES),
}
"""Name -> case, ranks, and what it changes; each is compared with the case on one rank."""


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory):
    """All variants, and each case on one rank; ``packed_nodes`` ends after its first step and goes on."""
    from nemo_bard.checkpoints.convert import convert
    from nemo_bard.checkpoints.tiny import make_tiny_qwen3_vl

    folder = tmp_path_factory.mktemp("ranks")
    other = make_tiny_qwen3_vl(folder / "other", seed=1, tie_word_embeddings=False)
    convert(other, folder / "anchor", block_size=4)
    where = {
        "model.pretrained_model_name_or_path": str(start),
        "dataset.path": str(write_mixture(folder / "data", 16)),
    }

    def job(name, case, changes):
        recipe, own = CASES[case]
        anchor = {"anchor.pretrained_model_name_or_path": str(folder / "anchor")} if recipe == "swd" else {}
        place = {"checkpoint.checkpoint_dir": str(folder / name)}
        return {
            "overrides": {**TRAIN, **where, **anchor, **own, **changes, **place},
            "recipe": recipe,
            "counts": str(folder / f"{name}.json"),
            **({"ranks_per_node": 2} if "distributed.dp_replicate_size" in changes else {}),
        }

    jobs = {1: [job(case, case, {}) for case in CASES], 2: [], 4: []}
    for name, (case, ranks, changes) in VARIANTS.items():
        if name == "packed_nodes":
            jobs[ranks].append(job(name, case, {**changes, "step_scheduler.max_steps": 1}))
        jobs[ranks].append(job(name, case, changes))
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(HERE / "ranks_driver.py"), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder, {Path(one["counts"]).stem: one for world in jobs.values() for one in world}


@pytest.mark.parametrize("name", [name for name in VARIANTS if "bfloat16" not in name])
def test_losses_and_gradients_are_those_of_one_rank(runs, name):
    folder, _ = runs
    one, many = read_log(folder / VARIANTS[name][0]), read_log(folder / name)
    assert [line["step"] for line in one] == [line["step"] for line in many] == [0, 1]
    for a, b in zip(one, many, strict=True):
        for key in ("loss", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=TOLERANCE), (a["step"], key)
        for key in ("num_samples", "num_loss_tokens", "num_tokens_per_step"):
            assert a[key] == b[key], (a["step"], key)


def test_bfloat16_is_near(runs):
    """Eight bits of mantissa; four ranks round their weights once, one rank each operation (autocast)."""
    folder, _ = runs
    for a, b in zip(read_log(folder / "plain"), read_log(folder / "plain_4_bfloat16"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)


@pytest.mark.parametrize("name", [name for name, (case, *_) in VARIANTS.items() if case != "lora"])
def test_a_rank_holds_and_receives_what_the_plan_says(runs, start, name):
    folder, jobs = runs
    _, ranks, changes = VARIANTS[name]
    job, counts = jobs[name], json.loads((folder / f"{name}.json").read_text())
    raw = load_raw_config(recipes_dir() / f"{job['recipe']}.yaml", list(job["overrides"].items()))
    plan = plan_of_recipe(
        raw,
        config=BardVLConfig.from_pretrained(start),
        world_size=ranks,
        gpus_per_node=job.get("ranks_per_node", ranks),
        device=GPUS["h100"],
        anchor=BardVLConfig.from_pretrained(folder / "anchor") if job["recipe"] == "swd" else None,
        measured={"prompt_tokens": 20, "response_tokens": 4, "image_tokens": 16},
    )
    assert plan.microbatches == len(counts["whole"]) == (1 if "packed" in name else 8 // ranks)
    assert plan.traffic.all_gather == counts["traffic"]["all_gather"]
    assert plan.traffic.reduce_scatter == counts["traffic"]["reduce_scatter"]
    assert plan.traffic.all_reduce == counts["traffic"]["all_reduce"]
    assert plan.memory["gradients, deferred"] == max(counts["whole"])
    deferred = plan.microbatches > 1 and not changes.keys() & AT_ONCE.keys()
    assert bool(max(counts["whole"])) == deferred
    share = 4 * plan.parameters.total // plan.sharding.shards
    assert counts["sharded"][-1] == share
    assert deferred or (plan.memory["gradients"] == share and set(counts["sharded"]) == {share})


def test_replicas_export_what_one_rank_does(runs):
    folder, _ = runs
    one, many = (load_weights(folder / name) for name in ("packed", "packed_nodes"))
    assert one.keys() == many.keys()
    for name, weight in one.items():
        # after two steps of AdamW, which divides small gradients by their own size
        assert torch.allclose(weight, many[name], atol=2e-4), name


def load_weights(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "LATEST" / "model" / "consolidated").glob("*.safetensors")
    return load_file(file)


def test_shards_of_all_ranks_are_put_together(runs, tmp_path):
    """``nemo-bard export`` of a checkpoint that upstream did not consolidate."""
    folder, _ = runs
    checkpoint = (folder / "packed_nodes" / "LATEST").resolve()
    shutil.copytree(
        checkpoint, tmp_path / "run" / checkpoint.name, ignore=shutil.ignore_patterns("consolidated", "optim")
    )
    shards = tmp_path / "run" / checkpoint.name / "model"
    assert len(list(shards.glob("shard-*.safetensors"))) > 1
    report = export(tmp_path / "run", tmp_path / "export")
    assert report.kind == "shards"
    expected = load_weights(folder / "packed_nodes")
    found = load_file(tmp_path / "export" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(found[key].equal(weight) for key, weight in expected.items())
    last = max(shards.glob("shard-*.safetensors"))
    last.unlink()
    with pytest.raises(ValueError, match=r"is missing|a shard is missing"):
        export(tmp_path / "run", tmp_path / "export2")
