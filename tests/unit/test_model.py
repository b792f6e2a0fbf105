from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

NAMES = ["tiny_tied", "tiny_untied"]


@pytest.fixture(scope="module")
def inputs():
    """Two short rows with a block-causal mask and positions."""
    length = 12
    ids = torch.randint(500, (2, length), generator=torch.Generator().manual_seed(0))
    block = torch.arange(length) // 4
    return {
        "input_ids": ids,
        "attention_mask": (block[:, None] >= block[None, :]).expand(2, 1, -1, -1),
        "position_ids": torch.arange(length).expand(3, 2, -1),
    }


def logits_of(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("name", NAMES)
class TestSaveAndLoad:
    def test_weights_and_logits_are_bit_exact(self, name, golden_model, golden_dir, inputs, tmp_path):
        from nemo_bard import BardVLForConditionalGeneration

        model = golden_model(name)
        model.save_pretrained(tmp_path)
        loaded = BardVLForConditionalGeneration.from_pretrained(tmp_path).eval()
        assert torch.equal(logits_of(loaded, inputs), logits_of(model, inputs))
        source = load_file(golden_dir / "models" / name / "model.safetensors")
        saved = load_file(tmp_path / "model.safetensors")
        assert saved.keys() == source.keys()
        assert all(torch.equal(saved[key], source[key]) for key in source)
        assert ("lm_head.weight" in saved) == (name == "tiny_untied")
        assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == (name == "tiny_tied")

    def test_files_and_fields(self, name, golden_model, tmp_path):
        from transformers import Qwen3VLConfig

        model = golden_model(name)
        model.save_pretrained(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {
            "config.json",
            "generation_config.json",
            "model.safetensors",
        }
        ours = json.loads((tmp_path / "config.json").read_text())
        assert ours["architectures"] == ["BardVLForConditionalGeneration"]
        assert ours["model_type"] == "bard_vl"
        own = {"block_size", "mask_token_id", "context_attention", "assistant_header_ids", "eos_token_id"}
        plain = {field: value for field, value in ours.items() if field not in own | {"architectures", "model_type"}}
        Qwen3VLConfig(**plain).save_pretrained(tmp_path / "qwen")
        theirs = json.loads((tmp_path / "qwen" / "config.json").read_text())
        assert plain == {field: theirs[field] for field in plain}
        assert theirs.keys() - ours.keys() == set()
        assert json.loads((tmp_path / "generation_config.json").read_text()).keys() == {
            "generation_config_class",
            "transformers_version",
        }

    def test_a_changed_configuration_comes_back(self, name, golden_dir, tmp_path):
        from nemo_bard import BardGenerationConfig, BardVLForConditionalGeneration

        fields = {
            "block_size": 8,
            "mask_token_id": 509,
            "context_attention": "causal",
            "assistant_header_ids": [504, 507, 508],
            "eos_token_id": [505, 506],
        }
        model = BardVLForConditionalGeneration.from_pretrained(golden_dir / "models" / name, **fields)
        assert {field: getattr(model.config, field) for field in fields} == fields
        model.generation_config = BardGenerationConfig(denoising_steps=2, pad_token_id=506)
        model.save_pretrained(tmp_path)
        loaded = BardVLForConditionalGeneration.from_pretrained(tmp_path)
        assert {field: getattr(loaded.config, field) for field in fields} == fields
        assert loaded.generation_config == model.generation_config

    def test_a_qwen3_vl_folder(self, name, golden_model, golden_dir, inputs, tmp_path):
        from transformers import Qwen3VLForConditionalGeneration

        from nemo_bard import BardVLConfig, BardVLForConditionalGeneration

        shutil.copytree(golden_dir / "models" / name, tmp_path / "source")
        path = tmp_path / "source" / "config.json"
        config = json.loads(path.read_text())
        config |= {"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"]}
        config["text_config"]["model_type"], config["vision_config"]["model_type"] = "qwen3_vl_text", "qwen3_vl"
        path.write_text(json.dumps(config))
        Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "source").save_pretrained(tmp_path / "qwen")
        for folder in ("source", "qwen"):  # as transformers 4.57 and 5 write it
            loaded = BardVLForConditionalGeneration.from_pretrained(tmp_path / folder).eval()
            assert type(loaded.config) is BardVLConfig
            assert torch.equal(logits_of(loaded, inputs), logits_of(golden_model(name), inputs))


class TestForward:
    def test_output_positions_are_rows_of_the_full_logits(self, golden_model, inputs):
        model = golden_model("tiny_tied")
        positions = torch.tensor([23, 0, 5, 5, 12])
        with torch.no_grad():
            some = model(**inputs, output_positions=positions)
        torch.testing.assert_close(some.logits, logits_of(model, inputs).flatten(0, 1)[positions], rtol=1e-5, atol=1e-5)

    def test_output_positions_may_be_none_at_all(self, golden_model, inputs):
        model = golden_model("tiny_tied")
        with torch.no_grad():
            none = model(**inputs, output_positions=torch.zeros(0, dtype=torch.int64)).logits
        assert none.shape == (0, 512)

    def test_gradients_reach_every_text_parameter(self, golden_dir, inputs):
        from nemo_bard import BardVLForConditionalGeneration

        model = BardVLForConditionalGeneration.from_pretrained(golden_dir / "models" / "tiny_tied")
        model(**inputs, output_positions=torch.tensor([3, 20])).logits.sum().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) == ("visual" in name), name

    def test_rows_that_may_attend_to_nothing_stay_finite(self, golden_model, inputs):
        """Padding of a training row; a nan there would reach every weight through the gradient of the others."""
        model = golden_model("tiny_tied")
        mask = inputs["attention_mask"].clone()
        mask[1, :, 8:] = False
        mask[1, :, :, 8:] = False
        logits = logits_of(model, {**inputs, "attention_mask": mask})
        assert logits.isfinite().all()
        short = {
            "input_ids": inputs["input_ids"][1:, :8],
            "attention_mask": inputs["attention_mask"][1:, :, :8, :8],
            "position_ids": inputs["position_ids"][:, 1:, :8],
        }
        torch.testing.assert_close(logits[1:, :8], logits_of(model, short), rtol=1e-5, atol=1e-5)

    def test_eager_refuses_a_bool_mask_and_is_right_with_a_float_one(self, golden_dir, golden_model, inputs):
        from nemo_bard import BardVLForConditionalGeneration

        eager = BardVLForConditionalGeneration.from_pretrained(
            golden_dir / "models" / "tiny_tied", attn_implementation="eager"
        ).eval()
        with pytest.raises(ValueError, match='attn_implementation="eager" adds a bool attention_mask as 0/1'):
            eager(**inputs)
        with pytest.raises(ValueError, match='attn_implementation="eager"'):
            eager(**inputs, output_positions=torch.tensor([0]))
        mask = torch.zeros(2, 1, 12, 12).masked_fill(~inputs["attention_mask"], torch.finfo(torch.float32).min)
        logits = logits_of(eager, {**inputs, "attention_mask": mask})
        torch.testing.assert_close(logits, logits_of(golden_model("tiny_tied"), inputs), rtol=1e-4, atol=1e-4)

    def test_an_eager_model_generates_all_the_same(self, golden_dir, golden_model):
        """The decoder brings its own backend."""
        from nemo_bard import BardVLForConditionalGeneration

        eager = BardVLForConditionalGeneration.from_pretrained(
            golden_dir / "models" / "tiny_tied", attn_implementation="eager"
        ).eval()
        settings = {"max_new_tokens": 8, "block_size": 4, "mask_token_id": 509, "eos_token_id": 505}
        prompt = torch.tensor([[5, 6, 7]])
        expected = golden_model("tiny_tied").generate(prompt, **settings)
        assert torch.equal(eager.generate(prompt, **settings), expected)


class TestRefusedFolders:
    def load(self, path):
        from nemo_bard import BardVLForConditionalGeneration

        return BardVLForConditionalGeneration.from_pretrained(path)

    def test_without_a_config(self, tmp_path):
        with pytest.raises(ValueError, match=f"{tmp_path} has no config.json; a Qwen3-VL or Bard-VL checkpoint"):
            self.load(tmp_path)

    @pytest.mark.parametrize("model_type", ["qwen2_vl", "llama", None])
    def test_of_another_architecture(self, model_type, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        with pytest.raises(ValueError, match=f"model_type is {model_type!r}, allowed are qwen3_vl, bard_vl"):
            self.load(tmp_path)

    def test_with_a_config_that_is_not_json(self, tmp_path):
        (tmp_path / "config.json").write_text("{model_type: qwen3_vl")
        with pytest.raises(ValueError, match=str(tmp_path / "config.json")):
            self.load(tmp_path)
