"""Keys read from the source of AutoModel and transformers are those of what is imported."""

import dataclasses
import inspect
import subprocess
import sys

import pytest

from nemo_bard.upstream.sections import INFRASTRUCTURE, UNKNOWN, constructor_keys, keys_read, section_keys


def defaults_of(cls):
    return {field.name: field.default for field in dataclasses.fields(cls)}


def sections():
    from nemo_automodel.components._peft.lora import PeftConfig
    from nemo_automodel.components.checkpoint.config import CheckpointingConfig
    from nemo_automodel.components.distributed.config import FSDP2Config
    from nemo_automodel.components.loggers.loggers import MLflowConfig
    from nemo_automodel.components.optim.optimizer import LRSchedulerConfig
    from nemo_automodel.components.training.prewarm import PrewarmConfig
    from nemo_automodel.components.training.step_scheduler import StepSchedulerConfig
    from nemo_automodel.components.utils.model_utils import FreezeConfig

    sizes = {"strategy", "tp_size", "pp_size", "cp_size", "ep_size", "dp_size", "dp_replicate_size", "pipeline", "moe"}
    return {
        "step_scheduler": (StepSchedulerConfig, {"local_batch_size"}),
        "lr_scheduler": (LRSchedulerConfig, {"_target_"}),
        "checkpoint": (CheckpointingConfig, {"restore_from"}),
        "freeze_config": (FreezeConfig, set()),
        "peft": (PeftConfig, {"_target_"}),
        "prewarm": (PrewarmConfig, set()),
        "mlflow": (MLflowConfig, set()),
        "distributed": (FSDP2Config, {"_target_", *sizes}),
    }


@pytest.mark.parametrize(
    "section", ["step_scheduler", "lr_scheduler", "checkpoint", "freeze_config", "peft", "prewarm"]
)
def test_keys_and_defaults_are_those_of_the_class(section):
    cls, more = sections()[section]
    found, expected = section_keys()[section], defaults_of(cls)
    assert set(found) == set(expected) | more
    for key, value in expected.items():
        if found[key] is not UNKNOWN:
            assert found[key] == value, key


@pytest.mark.parametrize("section", ["distributed", "mlflow"])
def test_keys_are_those_of_the_class(section):
    cls, more = sections()[section]
    assert set(section_keys()[section]) == set(defaults_of(cls)) | more


def test_the_loader_takes_what_automodel_allows():
    """AutoModel lists these in a function; a key that it does not know ends in a TypeError that names it."""
    from nemo_automodel.recipes._typed_config import RecipeConfig

    keys = set(section_keys()["dataloader"]) - {"_target_", "collate_fn"}
    dataset = {"_target_": lambda: [1]}
    values = dict.fromkeys(keys, None) | {"shuffle": True, "num_workers": 0}
    RecipeConfig.resolve_vlm_dataloader(dataset, values)
    with pytest.raises(TypeError, match="Unexpected VLM dataloader config"):
        RecipeConfig.resolve_vlm_dataloader(dataset, {**values, "batch_size": 1})


def test_model_keys_are_arguments_and_fields_of_the_configuration():
    from nemo_automodel import NeMoAutoModelForImageTextToText

    from nemo_bard import BardVLConfig

    found, config = set(section_keys()["model"]), {field.name for field in dataclasses.fields(BardVLConfig)}
    arguments = set(inspect.signature(NeMoAutoModelForImageTextToText.from_pretrained).parameters)
    assert arguments - set(INFRASTRUCTURE) - {"model_args", "kwargs"} <= found
    assert not found & set(INFRASTRUCTURE)
    own = {"block_size", "mask_token_id", "context_attention", "assistant_header_ids", "eos_token_id", "text_config"}
    assert own <= found & config
    assert {"dtype", "revision", "token", "cache_dir", "trust_remote_code"} <= found


def test_the_recipe_reads_these_sections():
    assert {"seed", "compile", "fp8", "quantization", "processor", "packed_sequence", "wandb"} <= set(keys_read())
    assert set(section_keys()) - set(keys_read()) == set()
    assert not {"vlm_dataloader", "get", "to_dict", "noise", "comet"} & set(keys_read())
    assert set(section_keys()["dist_env"]) == {"backend", "timeout_minutes"}
    assert set(section_keys()["clip_grad_norm"]) == {"max_norm", "backend"}


def test_our_collator_is_read_like_theirs():
    from nemo_bard.data.collate import BlockDiffusionCollator

    found = constructor_keys("nemo_bard.data.collate", "BlockDiffusionCollator")
    assert list(found) == list(inspect.signature(BlockDiffusionCollator).parameters)


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from nemo_bard.upstream.sections import section_keys; section_keys();"
        "print([m for m in ('torch', 'transformers', 'nemo_automodel') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
