"""What ``import nemo_bard`` does and does not do, and who finds our classes afterwards; in fresh processes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

import nemo_bard

CHEAP = """
import sys, time
start = time.perf_counter()
import nemo_bard
seconds = time.perf_counter() - start
heavy = [name for name in ("torch", "transformers", "nemo_automodel", "numpy") if name in sys.modules]
dir(nemo_bard), nemo_bard.__version__
import json
json.dump({"seconds": seconds, "heavy": heavy}, sys.stderr)
"""

LAZY = """
import json, sys
import nemo_bard
import torch
from transformers import AutoConfig, AutoModelForImageTextToText
folder, after = sys.argv[1], {}

def about(model):
    from nemo_bard import BardGenerationConfig, BardVLConfig, BardVLForConditionalGeneration
    return {
        "ours": isinstance(model, BardVLForConditionalGeneration),
        "name": type(model).__name__,
        "config": type(model.config) is BardVLConfig,
        "generation_config": type(model.generation_config) is BardGenerationConfig,
        "max_new_tokens": model.generation_config.max_new_tokens,
        "parallelizer": type(type(model).parallelizer).__name__,
        "tokens": model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=6, block_size=4,
                                 mask_token_id=509, eos_token_id=505).tolist(),
    }

config = AutoConfig.from_pretrained(folder)
after["config"] = type(config).__module__ + "." + type(config).__name__
after["model_module_before_use"] = "nemo_bard.model.modeling" in sys.modules
after["auto"] = about(AutoModelForImageTextToText.from_pretrained(folder))
from nemo_bard.train import cpu_compat
cpu_compat.apply()
from nemo_automodel import NeMoAutoModelForImageTextToText
after["nemo"] = about(NeMoAutoModelForImageTextToText.from_pretrained(folder, torch_dtype="float32"))
from nemo_bard import BardVLForConditionalGeneration
after["direct"] = about(BardVLForConditionalGeneration.from_pretrained(folder))
open(sys.argv[2], "w").write(json.dumps(after))
"""


def run(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=300, check=True)


def test_importing_the_package_is_cheap_and_silent():
    done = run(CHEAP)
    result = json.loads(done.stderr)
    assert done.stdout == ""
    assert result["heavy"] == []
    assert result["seconds"] < 0.5


@pytest.fixture(scope="module")
def lazily_loaded(tmp_path_factory, golden_dir) -> dict[str, Any]:
    """One fresh process that imports ``nemo_bard`` first and loads a saved checkpoint in three ways."""
    from nemo_bard import BardGenerationConfig, BardVLForConditionalGeneration

    folder = tmp_path_factory.mktemp("registration")
    model = BardVLForConditionalGeneration.from_pretrained(golden_dir / "models" / "tiny_untied")
    model.generation_config = BardGenerationConfig(max_new_tokens=77)
    model.save_pretrained(folder / "model")
    run(LAZY, str(folder / "model"), str(folder / "result.json"))
    return json.loads((folder / "result.json").read_text())


def test_auto_config_finds_ours_without_loading_the_model(lazily_loaded):
    assert lazily_loaded["config"] == "nemo_bard.model.configuration.BardVLConfig"
    assert lazily_loaded["model_module_before_use"] is False


@pytest.mark.parametrize("way", ["auto", "nemo", "direct"])
def test_every_loader_gives_our_class(way, lazily_loaded):
    found = lazily_loaded[way]
    assert found["ours"]
    assert found["name"] == "BardVLForConditionalGeneration"
    assert found["config"]
    assert found["generation_config"]
    assert found["max_new_tokens"] == 77
    assert found["tokens"] == lazily_loaded["direct"]["tokens"]


def test_automodel_takes_its_custom_model_path(lazily_loaded):
    """Its Hugging Face path would train too, in silence; the custom path knows Qwen3-VL's parallelizer."""
    assert lazily_loaded["nemo"]["parallelizer"] == "Qwen3VLModelParallelizer"


def test_registering_again_changes_nothing():
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from nemo_bard import BardVLConfig
    from nemo_bard.upstream import registration as _registration

    finders = list(sys.meta_path)
    _registration.install()
    _registration.install()
    assert sys.meta_path == finders
    assert CONFIG_MAPPING["bard_vl"] is BardVLConfig
    assert type(AutoConfig.for_model("bard_vl")) is BardVLConfig


def test_tables_that_are_loaded_already_are_filled_at_once(monkeypatch):
    """As when transformers was imported before this package."""
    from transformers.models.auto import configuration_auto, modeling_auto

    from nemo_bard.upstream import registration as _registration

    config, model = configuration_auto.CONFIG_MAPPING, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    for table, key in ((config._mapping, "bard_vl"), (model._model_mapping, "bard_vl")):
        monkeypatch.setitem(table, key, None)
        del table[key]
    _registration.install()
    assert config._mapping["bard_vl"] == "BardVLConfig"
    assert model._model_mapping["bard_vl"] == "BardVLForConditionalGeneration"


def test_public_names_are_lazy_but_listed():
    assert set(nemo_bard.__all__) <= set(dir(nemo_bard))
    from nemo_bard.generation.settings import BardGenerationConfig
    from nemo_bard.model.configuration import BardVLConfig

    assert nemo_bard.BardVLConfig is BardVLConfig
    assert nemo_bard.BardGenerationConfig is BardGenerationConfig
    with pytest.raises(AttributeError, match="has no attribute 'Bard'"):
        nemo_bard.Bard  # noqa: B018
