"""The mask token has a name, no text becomes it unseen, and nothing else of a tokenizer changes."""

import json
import shutil

import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer

from nemo_bard.base.names import MASK_TOKEN
from nemo_bard.checkpoints.convert import convert
from nemo_bard.checkpoints.mask_token import name_mask_token
from nemo_bard.checkpoints.source import read_tokenizer
from nemo_bard.checkpoints.tiny import make_tiny_qwen3_vl
from nemo_bard.data.collate import BlockDiffusionCollator
from nemo_bard.model.configuration import BardVLConfig
from nemo_bard.model.modeling import BardVLForConditionalGeneration

TEXTS = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Which digit is 7 3?<|im_end|>\n",
    "caf\u00e9 \u4f60\u597d \U0001f600 <| mask |> <|mask <|MASK|> [MASK]",
    "<think>\n\n</think><tool_call>{}</tool_call>\u0000\r\n  \t",
    "",
)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return make_tiny_qwen3_vl(tmp_path_factory.mktemp("tiny") / "qwen")


@pytest.fixture(scope="module", params=[None, 550, 556], ids=["default", "next", "gap"])
def pair(request, qwen, tmp_path_factory):
    """Tokenizer of the source, that of the converted folder, its mask id, and the folder."""
    folder = tmp_path_factory.mktemp("bard") / "bard"
    report = convert(qwen, folder, mask_token_id=request.param)
    assert report.mask_token == MASK_TOKEN
    return AutoTokenizer.from_pretrained(qwen), AutoTokenizer.from_pretrained(folder), report.mask_token_id, folder


def test_name_and_id(pair):
    before, after, mask, folder = pair
    assert after.convert_ids_to_tokens(mask) == MASK_TOKEN
    assert (after.mask_token, after.mask_token_id) == (MASK_TOKEN, mask)
    assert len(after) == mask + 1 <= json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
    assert after.vocab_size == before.vocab_size
    new = set(after.get_vocab().items()) - set(before.get_vocab().items())
    assert sorted(id_ for _, id_ in new) == list(range(len(before), mask + 1))
    assert (after.eos_token_id, after.pad_token_id) == (before.eos_token_id, before.pad_token_id)


def test_other_texts_are_encoded_as_before(pair):
    before, after, _, _ = pair
    for text in TEXTS:
        assert after(text)["input_ids"] == before(text)["input_ids"]
    ids = list(range(len(before)))
    for skip in (False, True):
        assert after.decode(ids, skip_special_tokens=skip) == before.decode(ids, skip_special_tokens=skip)


def test_decoding_shows_or_skips_it(pair):
    before, after, mask, _ = pair
    red = before(" red")["input_ids"]
    assert after.decode([*red, mask, *red], skip_special_tokens=False) == f" red{MASK_TOKEN} red"
    assert after.decode([*red, *range(len(before), mask + 1), *red], skip_special_tokens=True) == " red red"


def test_saved_and_loaded_again(pair, tmp_path):
    _, after, mask, folder = pair
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == after.get_vocab()
    assert again.mask_token_id == mask


def test_folder_that_has_the_name_keeps_it(pair, tmp_path):
    _, _, mask, folder = pair
    report = convert(folder, tmp_path / "again")
    assert (report.mask_token, report.mask_token_id) == (MASK_TOKEN, mask)
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def old_spelling(folder):
    """Make tokenizer files as transformers 4.57 writes them."""
    content = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["additional_special_tokens"] = config.pop("extra_special_tokens")
    tokens = [dict(token) for token in content["added_tokens"]]
    config["added_tokens_decoder"] = {str(token.pop("id")): token for token in tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ids = {token["content"]: token["id"] for token in content["added_tokens"]}
    (folder / "added_tokens.json").write_text(json.dumps(ids))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))


def no_tokenizer_json(folder):
    old_spelling(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in content["model"]["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


@pytest.mark.parametrize("spell", [old_spelling, no_tokenizer_json])
def test_other_spellings_of_a_tokenizer(qwen, tmp_path, spell):
    source = shutil.copytree(qwen, tmp_path / "source")
    spell(source)
    before = AutoTokenizer.from_pretrained(source)
    report = convert(source, tmp_path / "bard", mask_token_id=553)
    after = AutoTokenizer.from_pretrained(tmp_path / "bard")
    assert (report.mask_token, after.mask_token_id) == (MASK_TOKEN, 553)
    for text in TEXTS:
        assert after(text)["input_ids"] == before(text)["input_ids"]
    config = json.loads((tmp_path / "bard/tokenizer_config.json").read_text())
    assert config["added_tokens_decoder"]["553"]["content"] == MASK_TOKEN
    assert json.loads((tmp_path / "bard/added_tokens.json").read_text())[MASK_TOKEN] == 553
    assert json.loads((tmp_path / "bard/special_tokens_map.json").read_text())["mask_token"] == MASK_TOKEN


def test_no_name_where_it_cannot_be_given(qwen, tmp_path):
    """A tokenizer with a mask token of its own stays as it is, and the report says so."""
    source = shutil.copytree(qwen, tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.save_pretrained(source)
    report = convert(source, tmp_path / "bard")
    assert report.mask_token is None
    assert f"mask token {len(tokenizer)} (without a name in the tokenizer)" in str(report)
    assert (tmp_path / "bard/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert name_mask_token(source, read_tokenizer(source).tokenizer, 5) is None


def test_a_prompt_cannot_hold_masks(pair):
    _, after, mask, folder = pair
    model = BardVLForConditionalGeneration.from_pretrained(folder)
    ids = after([f"<|im_start|>user\nSay {MASK_TOKEN} yes<|im_end|>\n<|im_start|>assistant\n"], return_tensors="pt")
    with pytest.raises(
        ValueError, match=rf"row 0 of input_ids: the prompt holds the mask token \(id {mask}\).*<\|mask\|>"
    ) as error:
        model.generate(ids, max_new_tokens=4)
    assert "\n" not in str(error.value)
    padded = torch.tensor([[mask, mask, 65, 66]])
    answer = model.generate({"input_ids": padded, "attention_mask": (padded != mask).long()}, max_new_tokens=4)
    assert torch.equal(answer, model.generate(torch.tensor([[65, 66]]), max_new_tokens=4))


def test_a_training_sample_cannot_hold_masks(pair):
    _, _, mask, folder = pair
    collator = BlockDiffusionCollator(AutoProcessor.from_pretrained(folder), BardVLConfig.from_pretrained(folder))
    for turns in (("hi", f"a {MASK_TOKEN}"), (f"{MASK_TOKEN}?", "red")):
        conversation = [
            {"role": role, "content": [{"type": "text", "text": text}]}
            for role, text in zip(("user", "assistant"), turns, strict=True)
        ]
        for look in (collator.encode, collator.outline):
            with pytest.raises(ValueError, match=rf"sample 3: its text holds the mask token \(id {mask}\)"):
                look({"conversation": conversation, "sample_index": 3})
