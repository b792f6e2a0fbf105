from __future__ import annotations

import json
import logging

import pytest

from nemo_bard.generation.settings import BardGenerationConfig
from nemo_bard.model.configuration import (
    QWEN3_VL_ASSISTANT_HEADER_IDS,
    QWEN3_VL_EOS_TOKEN_ID,
    QWEN3_VL_MASK_TOKEN_ID,
    BardVLConfig,
)

OWN_FIELDS = {"block_size", "mask_token_id", "context_attention", "assistant_header_ids", "eos_token_id"}
CHANGED = {
    "max_new_tokens": 64,
    "block_size": 8,
    "denoising_steps": 4,
    "remasking_strategy": "entropy_bound",
    "confidence_threshold": 0.7,
    "entropy_bound": 0.3,
    "edit_threshold": 0.9,
    "max_post_edit_steps": 2,
    "temperature": 0.7,
    "top_k": 5,
    "top_p": 0.9,
    "suppress_mask_token": False,
    "mask_token_id": 9,
    "eos_token_id": [5, 6],
    "pad_token_id": 3,
    "bos_token_id": 1,
    "decode_path": "plain",
    "cache_implementation": "static",
    "compile_step": False,
    "return_dict_in_generate": True,
    "return_step_stats": True,
    "output_history": True,
    "adapter": "b8",
    "drafts": 2,
}
QWEN_FILE = {
    "bos_token_id": 151643,
    "pad_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "top_k": 20,
    "top_p": 0.8,
    "repetition_penalty": 1.0,
    "temperature": 0.7,
    "transformers_version": "4.56.0",
}


def written(config: BardGenerationConfig, folder) -> dict:
    config.save_pretrained(folder)
    return json.loads((folder / "generation_config.json").read_text())


class TestModelConfig:
    def small(self, **fields) -> BardVLConfig:
        return BardVLConfig(text_config={"vocab_size": 512}, **fields)

    def test_round_trip(self, tmp_path):
        fields = {
            "block_size": 8,
            "mask_token_id": 509,
            "context_attention": "causal",
            "assistant_header_ids": [504, 507, 508],
            "eos_token_id": [505, 506],
        }
        config = self.small(**fields)
        config.save_pretrained(tmp_path)
        loaded = BardVLConfig.from_pretrained(tmp_path)
        assert {name: getattr(loaded, name) for name in fields} == fields
        assert loaded.to_dict() == config.to_dict()

    def test_only_what_differs_from_qwen3_vl_is_written(self):
        from transformers import Qwen3VLConfig

        ours, theirs = self.small().to_dict(), Qwen3VLConfig(text_config={"vocab_size": 512}).to_dict()
        different = {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}
        assert ours["model_type"] == "bard_vl"
        assert different <= {"model_type", *OWN_FIELDS}
        assert ours.keys() - theirs.keys() <= OWN_FIELDS

    def test_qwen3_vls_vocabulary_brings_its_ids(self):
        config = BardVLConfig()
        assert config.text_config.vocab_size == 151936
        assert config.mask_token_id == QWEN3_VL_MASK_TOKEN_ID == 151671
        assert config.end_ids == [QWEN3_VL_EOS_TOKEN_ID] == [151645]
        assert config.assistant_header_ids == list(QWEN3_VL_ASSISTANT_HEADER_IDS)

    def test_given_ids_win_over_the_vocabularys(self):
        config = BardVLConfig(mask_token_id=151935, eos_token_id=[1, 2], assistant_header_ids=[3])
        assert (config.mask_token_id, config.end_ids, config.assistant_header_ids) == (151935, [1, 2], [3])

    def test_another_vocabulary_brings_none(self):
        config = self.small()
        assert config.mask_token_id is None
        assert config.end_ids == []
        assert config.assistant_header_ids is None
        assert config.block_size is None
        assert config.context_attention == "block"

    @pytest.mark.parametrize("mask_token_id", [-1, 512, 151671])
    def test_the_mask_token_lies_inside_the_embedding(self, mask_token_id):
        with pytest.raises(
            ValueError, match=f"mask_token_id must be a row of the embedding, 0 to 511, got {mask_token_id}"
        ):
            self.small(mask_token_id=mask_token_id)

    @pytest.mark.parametrize("block_size", [0, -4])
    def test_the_block_size_is_positive(self, block_size):
        with pytest.raises(ValueError, match=f"block_size must be an integer >= 1, got {block_size}"):
            self.small(block_size=block_size)

    def test_the_context_attention_is_known(self):
        with pytest.raises(ValueError, match="context_attention must be one of block, causal, got 'full'"):
            self.small(context_attention="full")

    def test_sub_types_of_released_checkpoints(self):
        """Those name their parts ``bard_vl`` and ``bard_vl_text``."""
        config = BardVLConfig(
            text_config={"model_type": "bard_vl_text", "vocab_size": 512, "hidden_size": 64},
            vision_config={"model_type": "bard_vl", "depth": 3},
        )
        assert (config.text_config.hidden_size, config.vision_config.depth) == (64, 3)
        assert config.text_config.model_type == "qwen3_vl_text"


class TestGenerationConfig:
    def test_round_trip_of_every_setting(self, tmp_path):
        assert CHANGED.keys() == set(BardGenerationConfig.known_keys())
        config = BardGenerationConfig(**CHANGED)
        file = written(config, tmp_path)
        assert {name: file[name] for name in CHANGED} == CHANGED
        loaded = BardGenerationConfig.from_pretrained(tmp_path)
        assert {name: getattr(loaded, name) for name in CHANGED} == CHANGED
        assert loaded == config

    def test_defaults_are_not_written(self, tmp_path):
        assert written(BardGenerationConfig(), tmp_path).keys() == {"generation_config_class", "transformers_version"}
        file = written(BardGenerationConfig(top_k=7), tmp_path)
        assert file.keys() == {"generation_config_class", "transformers_version", "top_k"}

    def test_defaults_are_the_model_cards(self):
        config = BardGenerationConfig()
        assert config.max_new_tokens == 1024
        assert config.remasking_strategy == "low_confidence_dynamic"
        assert (config.confidence_threshold, config.temperature, config.top_k, config.top_p) == (0.5, 0.0, 0, 1.0)

    def test_an_unknown_key_names_the_nearest(self):
        with pytest.raises(ValueError, match=r"unknown generation setting 'confidence_treshold'; did you mean"):
            BardGenerationConfig(confidence_treshold=0.5)

    def test_an_unknown_key_in_a_file_of_ours(self, tmp_path):
        BardGenerationConfig().save_pretrained(tmp_path)
        path = tmp_path / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "blocksize": 4}))
        with pytest.raises(ValueError, match=r"unknown generation setting 'blocksize'; did you mean 'block_size'\?"):
            BardGenerationConfig.from_pretrained(tmp_path)

    @pytest.mark.parametrize("name", sorted(BardGenerationConfig.known_keys()))
    def test_every_setting_refuses_nonsense_by_name(self, name):
        with pytest.raises(ValueError, match=name):
            BardGenerationConfig(**{name: object()})

    def test_settings_changed_later_are_checked_on_saving(self, tmp_path):
        config = BardGenerationConfig()
        config.top_p = 3.0
        with pytest.raises(ValueError, match="top_p"):
            config.save_pretrained(tmp_path)

    def test_of_another_models_file_only_token_ids_are_taken(self, tmp_path, caplog):
        (tmp_path / "generation_config.json").write_text(json.dumps(QWEN_FILE))
        with caplog.at_level(logging.INFO, logger="nemo_bard.generation.settings"):
            config = BardGenerationConfig.from_pretrained(tmp_path)
        taken = {name: QWEN_FILE[name] for name in ("bos_token_id", "pad_token_id", "eos_token_id")}
        defaults = BardGenerationConfig()
        for name in BardGenerationConfig.known_keys():
            assert getattr(config, name) == taken.get(name, getattr(defaults, name))
        assert "do_sample, top_k, top_p, repetition_penalty, temperature" in caplog.text

    def test_of_another_class_only_token_ids_are_taken(self):
        from transformers import GenerationConfig

        other = GenerationConfig(**{k: v for k, v in QWEN_FILE.items() if k != "transformers_version"})
        config = BardGenerationConfig.from_generation_config(other)
        assert config.eos_token_id == [151645, 151643]
        assert (config.temperature, config.top_k, config.top_p) == (0.0, 0, 1.0)

    def test_our_file_read_by_transformers_and_back(self, tmp_path):
        """AutoModel's loader does that."""
        from transformers import GenerationConfig

        config = BardGenerationConfig(**CHANGED)
        config.save_pretrained(tmp_path)
        back = BardGenerationConfig.from_generation_config(GenerationConfig.from_pretrained(tmp_path))
        assert {name: getattr(back, name) for name in CHANGED} == CHANGED
        assert BardGenerationConfig.from_generation_config(config) is config
        assert BardGenerationConfig.from_generation_config(None) == BardGenerationConfig()

    def test_updated_copies(self):
        config = BardGenerationConfig(top_k=3)
        changed = config.updated(block_size=4)
        assert (changed.top_k, changed.block_size, config.block_size) == (3, 4, None)
        with pytest.raises(ValueError, match="unknown generation setting 'do_sample'"):
            config.updated(do_sample=True)

    def test_deep_copies_are_equal(self):
        import copy

        config = BardGenerationConfig(**CHANGED)
        assert copy.deepcopy(config) == config
        assert config != BardGenerationConfig()

    @pytest.mark.parametrize("cache", [None, "dynamic"])
    def test_compiling_needs_fixed_shapes(self, cache):
        with pytest.raises(ValueError, match='compile_step=True needs cache_implementation="static"'):
            BardGenerationConfig(compile_step=True, cache_implementation=cache)
