"""What a recipe file may say: every wrong key or value is one line that names it."""

import copy
import json
import subprocess
import sys

import pytest
import yaml

from nemo_bard.base.paths import recipes_dir
from nemo_bard.method.losses import BlockDiffusionCrossEntropy
from nemo_bard.method.objectives import PBMObjective
from nemo_bard.method.schedule import NoiseSettings
from nemo_bard.train import keys
from nemo_bard.train.config import validate_recipe
from nemo_bard.upstream.sections import UNKNOWN, section_keys

LORA = {"_target_": "nemo_automodel.components._peft.lora.PeftConfig", "dim": 8}


@pytest.fixture
def raw(tmp_path):
    """``recipes/pbm.yaml`` with a checkpoint folder and a data set."""
    recipe = yaml.safe_load((recipes_dir() / "pbm.yaml").read_text())
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "config.json").write_text(json.dumps({"model_type": "bard_vl"}))
    (tmp_path / "train.jsonl").write_text("{}\n")
    recipe["model"]["pretrained_model_name_or_path"] = str(tmp_path / "start")
    recipe["dataset"]["path"] = str(tmp_path / "train.jsonl")
    return recipe


def changed(raw, dotted, value):
    raw = copy.deepcopy(raw)
    *parents, leaf = dotted.split(".")
    node = raw
    for name in parents:
        node = node.setdefault(name, {})
    if value is ...:
        del node[leaf]
    else:
        node[leaf] = value
    return raw


def test_adapters_frozen_modules_and_levels_are_accepted(raw):
    raw = changed(raw, "freeze_config", {"freeze_modules": [{"glob": "model.visual.*"}]})
    raw = changed(raw, "validation_noise", {"levels": [0.25, 1]})
    validate_recipe(changed(raw, "checkpoint.best_metric_key", "val_loss_t0.25"))
    validate_recipe(changed(raw, "peft", LORA))
    with pytest.raises(ValueError, match="checkpoint.is_async must be false with peft"):
        validate_recipe(changed(changed(raw, "peft", LORA), "checkpoint.is_async", True))
    with pytest.raises(ValueError, match="model.text_config cannot be changed with peft"):
        validate_recipe(changed(changed(raw, "peft", LORA), "model.text_config", {"num_hidden_layers": 2}))


def test_shipped_recipe_is_accepted(raw):
    validate_recipe(raw)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("nose", {}, "unknown recipe key nose; did you mean noise?"),
        ("step_scheduler.global_batchsize", 4, "did you mean step_scheduler.global_batch_size?"),
        ("model.block_sise", 4, "unknown recipe key model.block_sise; did you mean model.block_size?"),
        ("dataset.pathh", "x", "unknown recipe key dataset.pathh; did you mean dataset.path?"),
        ("dataloader.collate_fn.max_len", 9, "did you mean dataloader.collate_fn.max_length?"),
        ("loss_fn.reductoin", "sum", "did you mean loss_fn.reduction?"),
        ("noise.hihg", 1.0, "unknown recipe key noise.hihg; did you mean noise.high?"),
        ("validation_noise", {"nam": "mask"}, "unknown recipe key validation_noise.nam"),
        ("noise.name", "maks", "noise.name must be one of mask, uniform, mixed, got 'maks' (did you mean 'mask'?)"),
        ("noise.low", 0.0, "noise.low must be in (0, 1], got 0.0"),
        ("noise", {"low": 0.5, "high": 0.4}, "0 < low <= high <= 1"),
        ("noise.low", "x", "noise.low must be in (0, 1], got 'x'"),
        ("noise.num_random_ids", 0, "noise.num_random_ids must be an integer >= 1"),
        ("model", ..., "the recipe needs a section 'model'"),
        ("model.block_size", 0, "model.block_size must be an integer >= 1, got 0"),
        ("model.attn_implementation", "eager", "must be one of auto, sdpa, bard, got 'eager'"),
        ("model.pretrained_model_name_or_path", None, "must name a checkpoint folder"),
        ("model.pretrained_model_name_or_path", "/no/such/folder", "/no/such/folder is not a folder"),
        ("dataset.path", None, "dataset.path must be set, got None"),
        ("dataset.path", "/no/such.jsonl", "dataset.path: /no/such.jsonl does not exist"),
        ("dataset._target_", "nemo_bard.data.Nothing", "nemo_bard.data.Nothing cannot be imported"),
        ("distributed.strategy", "megatron_fsdp", "use fsdp2"),
        ("distributed.strategy", "fdsp2", "did you mean 'fsdp2'?"),
        ("distributed.tp_size", 2, "distributed.tp_size must be 1"),
        ("distributed.cp_size", 2, "distributed.cp_size must be 1"),
        ("distributed.pp_size", 2, "distributed.pp_size must be 1"),
        ("dataloader.persistent_workers", True, "dataloader.persistent_workers=True needs dataloader.num_workers > 0"),
        ("dist_env.backend", "mpi", "dist_env.backend must be one of auto, nccl, gloo, got 'mpi'"),
        ("compute_dtype", "float16", "compute_dtype must be one of"),
        ("loss_chunk_tokens", 0, "loss_chunk_tokens must be an integer >= 1 or null, got 0"),
        ("step_scheduler.local_batch_size", 3, "global_batch_size=256 must be divisible by"),
        ("step_scheduler.global_batch_size", 0, "global_batch_size must be an integer >= 1"),
        ("step_scheduler.max_steps", None, "set step_scheduler.max_steps or step_scheduler.num_epochs"),
        (
            "packed_sequence",
            {"pack_size": 9},
            "packed_sequence is not supported by this recipe: its collator would be replaced; use packing.max_length",
        ),
        ("packing.max_lenght", 9, "unknown recipe key packing.max_lenght; did you mean packing.max_length?"),
        (
            "distributed.dp_replicate_size",
            "nodes",
            "distributed.dp_replicate_size must be auto, null or an integer >= 1, got 'nodes'",
        ),
        ("distributed.dp_replicate_size", 0, "must be auto, null or an integer >= 1, got 0"),
        ("packing", 8192, "packing must be a section of keys, got 8192"),
        ("packing.max_length", 0, "packing.max_length must be an integer >= 1 or null, got 0"),
        ("packing.max_length", "8k", "packing.max_length must be an integer >= 1 or null, got '8k'"),
        ("packing", {"max_length": 99, "cache_dir": 3}, "packing.cache_dir must be a folder or null, got 3"),
        (
            "loss_fn._target_",
            "nemo_bard.method.MixturePathKL",
            "MixturePathKL does not go with noise.name: mask (its formula holds on the path from uniform noise)",
        ),
        ("loss_fn._target_", None, "loss_fn must have _target_"),
        ("optimizer._target_", None, "optimizer must have _target_"),
        ("optimizer.beta", 0.9, "unknown recipe key optimizer.beta; did you mean optimizer.betas?"),
        ("optimizer.lr", "2e-5x", "optimizer.lr must be a number >= 0, got '2e-5x'"),
        ("noise.schedule", [{"until": 0.5}, {"nam": "mask"}], "unknown recipe key noise.schedule[1].nam"),
        ("noise.shedule", [], "unknown recipe key noise.shedule; did you mean noise.schedule?"),
        ("validation_noise", {"schedule": []}, "unknown recipe key validation_noise.schedule"),
        ("noise.complementary", 1, "noise.complementary must be true or false, got 1"),
        ("ar_loss_weight", -0.1, "ar_loss_weight must be a finite number >= 0, got -0.1"),
        ("ar_loss_weight", None, "ar_loss_weight must be a finite number >= 0, got None"),
        ("ar_loss_weight", 0.5, "ar_loss_weight=0.5 needs a model with context_attention: causal"),
        ("seed", "abc", "seed must be an integer, got 'abc'"),
        ("dataloader.collate_fn", None, "dataloader.collate_fn must be a section"),
        ("ema", {"decay": 0.999}, "ema: NeMo AutoModel 0.7.0 has no average of weights"),
        ("freeze_config", {}, "freeze_config must say freeze_vision_tower: true or false"),
        ("freeze_config", {"freeze_language_model": True}, "freeze_config must say freeze_vision_tower"),
        ("freeze_config", {"freeze_vision": True}, "did you mean freeze_config.freeze_vision_tower?"),
        ("peft", {"dim": 8}, "peft must have _target_"),
        ("peft", {**LORA, "dims": 8}, "did you mean peft.dim?"),
        ("peft", {**LORA, "match_all_linear": True}, "use peft.exclude_modules: [lm_head]"),
        ("peft", {**LORA, "use_dora": True}, "peft.use_dora: adapters of this kind cannot be merged"),
        ("peft", {**LORA, "dim": 0}, "peft.dim must be an integer >= 1, got 0"),
        ("validation_noise", {"levels": [0.0, 0.5]}, "validation_noise.levels must be a list of different numbers"),
        ("validation_noise", {"levels": [0.5, 0.5]}, "validation_noise.levels must be a list of different numbers"),
        ("validation_noise", {"levels": [0.5], "low": 0.1}, "exclude each other"),
        ("checkpoint.best_metric_key", "val_los", "did you mean 'val_loss'?"),
        ("checkpoint.best_metric_key", "val_loss_t0.5", "checkpoint.best_metric_key must be one of"),
    ],
)
def test_wrong_recipe_is_one_line_that_names_the_key(raw, key, value, message):
    with pytest.raises(ValueError, match="^[^\n]*$") as caught:
        validate_recipe(changed(raw, key, value))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model_type": "qwen3_vl"}', "nemo-bard convert"),
        ('{"model_type": "llama"}', "model_type is 'llama', allowed are qwen3_vl, bard_vl"),
        ("[]", "must hold a JSON object"),
        ("{", "not a JSON file"),
        (None, "has no config.json"),
    ],
)
def test_folder_that_is_no_start_point_is_refused(raw, tmp_path, config, message):
    file = tmp_path / "start" / "config.json"
    file.unlink()
    if config is not None:
        file.write_text(config)
    with pytest.raises(ValueError, match="^model.pretrained_model_name_or_path: ") as caught:
        validate_recipe(raw)
    assert message in str(caught.value)


def test_uniform_noise_goes_with_both_losses(raw):
    uniform = changed(raw, "noise.name", "uniform")
    validate_recipe(uniform)
    validate_recipe(changed(uniform, "loss_fn._target_", "nemo_bard.method.MixturePathKL"))


def test_packing_needs_our_collator(raw):
    packed = changed(raw, "packing.max_length", 4096)
    validate_recipe(packed)
    with pytest.raises(ValueError, match=r"packing needs dataloader.collate_fn._target_: .*, got 'my.collate'$"):
        validate_recipe(changed(packed, "dataloader.collate_fn._target_", "my.collate"))


@pytest.mark.parametrize("name", ["nemo_bard.collate", "nemo_bard.data.collate", "nemo_bard.data"])
def test_the_collator_is_known_by_all_its_names(raw, name):
    """Packed recipes of 0.1.0 name the first."""
    packed = changed(
        changed(raw, "packing.max_length", 4096), "dataloader.collate_fn._target_", f"{name}.BlockDiffusionCollator"
    )
    validate_recipe(packed)
    with pytest.raises(ValueError, match=r"unknown recipe key dataloader.collate_fn.max_lenght; did you mean"):
        validate_recipe(changed(packed, "dataloader.collate_fn.max_lenght", 3))


class OddEven(PBMObjective):
    parts = ("odd_loss", "even_loss")


class OddEvenLoss(BlockDiffusionCrossEntropy):
    objective_class = OddEven


def test_the_best_checkpoint_may_go_by_a_part_of_an_objective_of_ones_own(raw):
    best = changed(raw, "checkpoint.best_metric_key", "val_odd_loss")
    with pytest.raises(ValueError, match="checkpoint.best_metric_key must be one of"):
        validate_recipe(best)
    validate_recipe({**best, "loss_fn": {"_target_": OddEvenLoss}})


def test_a_loss_has_to_fit_the_noise_of_every_phase(raw):
    kl = changed(changed(raw, "noise.name", "uniform"), "loss_fn._target_", "nemo_bard.method.MixturePathKL")
    validate_recipe(changed(kl, "noise.schedule", [{"until": 0.5, "high": 0.5}, {"low": 0.2}]))
    phases = changed(kl, "noise.schedule", [{"until": 0.5}, {"name": "mask"}])
    with pytest.raises(
        ValueError, match=r"MixturePathKL does not go with noise.schedule\[1\].name: mask \(its formula"
    ):
        validate_recipe(phases)
    with pytest.raises(ValueError, match=r"MixturePathKL does not go with validation_noise.name: mask \(its formula"):
        validate_recipe(changed(kl, "validation_noise", {"name": "mask"}))


def test_the_joint_loss_goes_with_a_causal_context(raw, tmp_path):
    joint = changed(raw, "ar_loss_weight", 0.5)
    validate_recipe(changed(joint, "model.context_attention", "causal"))
    config = {"model_type": "bard_vl", "context_attention": "causal"}
    (tmp_path / "start" / "config.json").write_text(json.dumps(config))
    validate_recipe(joint)
    with pytest.raises(ValueError, match="needs a model with context_attention: causal .* got 'block'"):
        validate_recipe(changed(joint, "model.context_attention", "block"))


def test_noise_settings_have_the_published_defaults():
    assert NoiseSettings.from_dict(None) == NoiseSettings(name="mask", low=0.001, high=1.0, per="block")


def test_checking_a_recipe_imports_nothing_heavy():
    code = (
        "import sys, nemo_bard.train.config; print([m for m in ('transformers', 'nemo_automodel') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


UNUSED = {
    "compile": ({"enabled": True}, "use distributed.enable_compile: true"),
    "fp8": ({"enabled": True}, "would replace the LM head"),
    "quantization": ({"load_in_4bit": True}, "use peft on the weights as they are"),
    "packed_sequence": ({"pack_size": 9}, "use packing.max_length"),
    "mtp": ({"x": 1}, "see ar_loss_weight"),
    "model.quantization_config": ({"load_in_4bit": True}, "use peft on the weights as they are"),
    "model.use_liger_kernel": (True, "model.use_liger_kernel does nothing"),
    "distributed.sequence_parallel": (True, "tensor parallelism only"),
    "distributed.tp_plan": ("base", "tensor parallelism only"),
    "distributed.enable_async_tensor_parallel": (True, "tensor parallelism only"),
    "distributed.pipeline": ({"pp_schedule": "1f1b"}, "pp_size > 1 only"),
    "distributed.moe": ({"wrap_outer_model": False}, "mixtures of experts"),
    "distributed.patch_is_packed_sequence": (True, "flash attention only"),
    "prewarm.fla_gdn_autotune": (True, "gated delta nets"),
    "prewarm.mamba_ssd_autotune": (True, "Mamba layers"),
    "prewarm.pipeline_stage_compile": (True, "pipeline stages"),
    "peft.moe_rank_scaling": (True, "mixtures of experts"),
    "peft.expert_weight_format": ("mxfp4", "mixtures of experts"),
    "freeze_config.freeze_audio_tower": (True, "no audio tower"),
    "freeze_config.freeze_video_embedder": (True, "use freeze_modules"),
    "checkpoint.model_cache_dir": ("cache", "model.cache_dir; set that"),
    "checkpoint.model_repo_id": ("a/b", "model.pretrained_model_name_or_path; set that"),
    "checkpoint.is_peft": (True, "true with a section peft"),
    "checkpoint.model_state_dict_keys": (["a"], "is not read"),
    "checkpoint.dequantize_base_checkpoint": (True, "is not read"),
    "checkpoint.skip_task_head_prefixes_for_base_model": (["a"], "is not read"),
    "checkpoint.legacy_paramwrapper_layout": (True, "mixtures of experts"),
    "step_scheduler.loss_average_window_steps": (10, "logs no average"),
}


def with_key(raw, dotted, value):
    """The recipe with a key, its section having what it needs besides."""
    needed = {"peft": LORA, "freeze_config": {"freeze_vision_tower": True}, "prewarm": {}}
    section = dotted.split(".")[0]
    if "." in dotted and section in needed:
        raw = changed(raw, section, dict(needed[section]))
    return changed(raw, dotted, value)


def test_every_key_that_does_nothing_is_tried():
    assert UNUSED.keys() == keys.UNUSED.keys()


@pytest.mark.parametrize("key", UNUSED)
def test_a_key_that_does_nothing_is_refused_with_what_to_use_instead(raw, key):
    value, message = UNUSED[key]
    with pytest.raises(ValueError, match=f"^{key} [^\n]*, got [^\n]*$") as caught:
        validate_recipe(with_key(raw, key, value))
    assert message in str(caught.value)


@pytest.mark.parametrize("key", UNUSED)
def test_its_default_asks_for_nothing(raw, key):
    section, _, name = key.partition(".")
    for value in (None, section_keys()[section][name] if name else {"enabled": False}):
        validate_recipe(with_key(raw, key, value if value is not UNKNOWN else None))


def test_what_automodel_sets_itself_may_be_said(raw):
    raw = changed(raw, "peft", LORA)
    validate_recipe(changed(raw, "checkpoint.is_peft", True))
    validate_recipe(changed(raw, "checkpoint.model_repo_id", raw["model"]["pretrained_model_name_or_path"]))


@pytest.mark.parametrize(
    ("key", "value", "other", "good"),
    [
        ("distributed.fsdp2_forward_prefetch_depth", 2, "distributed.enable_fsdp2_prefetch", True),
        ("distributed.fsdp2_backward_prefetch_depth", 1, "distributed.enable_fsdp2_prefetch", True),
        ("distributed.activation_checkpointing_scope", "vision", "distributed.activation_checkpointing", True),
        ("checkpoint.wait_for_staging", True, "checkpoint.is_async", True),
        ("dataloader.prefetch_factor", 4, "dataloader.num_workers", 2),
    ],
)
def test_a_key_that_needs_another(raw, key, value, other, good):
    with pytest.raises(ValueError, match=f"^{key}={value!r} needs {other}"):
        validate_recipe(changed(raw, key, value))
    validate_recipe(changed(changed(raw, key, value), other, good))


@pytest.mark.parametrize(
    ("section", "target"), [("lr_scheduler", "torch.optim.lr_scheduler.StepLR"), ("distributed", "my.DDPManager")]
)
def test_a_target_that_automodel_drops(raw, section, target):
    with pytest.raises(ValueError, match=f"^{section}._target_ is not read: AutoModel builds .*, got {target}$"):
        validate_recipe(changed(raw, f"{section}._target_", target))
