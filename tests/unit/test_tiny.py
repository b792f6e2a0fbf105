import hashlib
import json

import pytest
import torch

from nemo_bard.checkpoints.tiny import ADDED_TOKENS, SPECIAL_TOKENS, main, make_tiny_qwen3_vl, make_tokenizer
from nemo_bard.cost.shapes import SHAPES, make_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_qwen3_vl(tmp_path_factory.mktemp("tiny") / "model", seed=3)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def conversation(*content, answer="12\n34"):
    return [{"role": "user", "content": list(content)}, {"role": "assistant", "content": answer}]


def test_ids_run_without_a_gap_and_special_tokens_are_one_token(tokenizer):
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    for token in SPECIAL_TOKENS + ADDED_TOKENS:
        assert tokenizer(token)["input_ids"] == [tokenizer.convert_tokens_to_ids(token)]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_digits_are_single_tokens_and_known_words_too(tokenizer):
    assert tokenizer.tokenize("31415") == list("31415")
    assert len(tokenizer("Read the digits.")["input_ids"]) == 4
    assert len(tokenizer("assistant\n")["input_ids"]) == 2


@pytest.mark.parametrize(
    "text", ["3141\n5926", "Zo\u00eb's caf\u00e9, \u4f60\u597d\t 12,5 %\r\n\n  end ", "\U0001f600 <b>"]
)
def test_decoding_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_chat_template(tokenizer):
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "yes"},
    ]
    expected = (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        "<|vision_start|><|video_pad|><|vision_end|>what?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    )
    assert tokenizer.apply_chat_template(turns, tokenize=False) == expected
    prompt = tokenizer.apply_chat_template(turns[:2], tokenize=False, add_generation_prompt=True)
    assert expected.startswith(prompt)
    assert prompt.endswith("<|im_start|>assistant\n")


def test_checkpoint_loads_reads_images_and_has_room_for_a_mask_token(folder):
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(model).__name__ == "Qwen3VLForConditionalGeneration"
    rows = model.get_input_embeddings().num_embeddings
    assert rows == model.config.text_config.vocab_size
    assert rows >= len(processor.tokenizer) + 8
    image = Image.effect_noise((128, 64), 60).convert("RGB")
    batch = processor.apply_chat_template(
        conversation({"type": "image", "image": image}, {"type": "text", "text": "Read the digits."}),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert batch["image_grid_thw"].tolist() == [[1, 4, 8]]
    assert int((batch["input_ids"] == model.config.image_token_id).sum()) == 8
    assert int((batch["mm_token_type_ids"] == 1).sum()) == 8
    with torch.no_grad():
        seen = model(**batch).logits
        other = model(**{**batch, "pixel_values": -batch["pixel_values"]}).logits
        ids = model.generate(**batch, max_new_tokens=2)
    assert seen.shape == (1, batch["input_ids"].shape[1], rows)
    assert not torch.allclose(seen[0, -1], other[0, -1], atol=1e-3)
    assert ids.shape[1] <= batch["input_ids"].shape[1] + 2


def test_images_above_the_limit_are_scaled_down(folder):
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    grid = processor.image_processor(Image.new("RGB", (2000, 900)), return_tensors="pt")["image_grid_thw"]
    assert int(grid.prod()) // 4 <= 64


def test_a_checkpoint_is_a_function_of_its_seed(folder, tmp_path):
    def digest(path):
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())}

    state = torch.random.get_rng_state()
    same, other = (make_tiny_qwen3_vl(tmp_path / name, seed=seed) for name, seed in (("same", 3), ("other", 4)))
    assert torch.equal(state, torch.random.get_rng_state())
    assert digest(same) == digest(folder)
    assert {name for name, value in digest(other).items() if value != digest(folder)[name]} == {"model.safetensors"}


@pytest.mark.parametrize("tied", [True, False])
def test_head_is_tied_or_not(tmp_path, tied):
    from safetensors import safe_open

    out = make_tiny_qwen3_vl(tmp_path / "model", tie_word_embeddings=tied, text={"num_hidden_layers": 1})
    with safe_open(out / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied  # noqa: SIM118
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is tied


def test_bad_values_are_one_line(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main([str(tmp_path / "full")]) == 2
    assert capsys.readouterr().err.strip() == f"error: output folder {tmp_path / 'full'} is not empty"
    with pytest.raises(ValueError, match="spare_tokens must be"):
        make_tiny_qwen3_vl(tmp_path / "a", spare_tokens=0)
    with pytest.raises(ValueError, match="max_image_tokens must be"):
        make_tiny_qwen3_vl(tmp_path / "b", max_image_tokens=0)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("name", "billions"),
    [("2b", 2.1275), ("4b", 4.4378), ("8b", 8.7671)],
)
def test_released_shapes_have_the_released_number_of_parameters(name, billions):
    from transformers import Qwen3VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(make_config(name))
    assert model.num_parameters() / 1e9 == pytest.approx(billions, abs=1e-4)


def test_unknown_shape_and_bad_head_are_named():
    with pytest.raises(ValueError, match=f"shape must be one of {', '.join(SHAPES)}, got '3b'"):
        make_config("3b")
    with pytest.raises(ValueError, match="must add up to head_dim / 2"):
        make_config("2b", text={"head_dim": 64})
