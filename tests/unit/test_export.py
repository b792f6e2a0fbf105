"""``convert``: a start point that keeps every weight byte, or one clear error and nothing written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from nemo_bard.base.files import link_or_copy
from nemo_bard.checkpoints.convert import convert, spell_rope_twice
from nemo_bard.checkpoints.mask_token import choose_mask_token_id
from nemo_bard.checkpoints.tiny import make_tokenizer
from nemo_bard.cli.app import main
from nemo_bard.generation.settings import BardGenerationConfig
from nemo_bard.model.configuration import BardVLConfig

ROWS_LEFT = 10
EMBEDDING = "model.language_model.embed_tokens.weight"
ROPE_4_57 = {
    "rope_theta": 5000000,
    "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, tokenizer):
    """A Qwen3-VL folder with a real tokenizer and two weights, in one file, spelled as transformers 4.57 does."""
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer.save_pretrained(folder)
    rows = len(tokenizer) + ROWS_LEFT
    text = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "num_hidden_layers": 3, "vocab_size": rows}
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "text_config": {**text, **ROPE_4_57, "model_type": "qwen3_vl_text"},
        "vision_config": {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "model_type": "qwen3_vl"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    generation = {"do_sample": True, "temperature": 0.7, "pad_token_id": tokenizer.pad_token_id}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "processor_config.json").write_text('{"processor_class": "Qwen3VLProcessor"}')
    (folder / "README.md").write_text("not part of a checkpoint")
    save_file({EMBEDDING: torch.randn(rows, 8), "lm_head.weight": torch.randn(rows, 8)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def source(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "source")


def edit_config(source, **changes):
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shard(source):
    """Split the weights into two files with an index."""
    rows = json.loads((source / "config.json").read_text())["text_config"]["vocab_size"]
    (source / "model.safetensors").unlink()
    names = {EMBEDDING: "model-00001-of-00002.safetensors", "lm_head.weight": "model-00002-of-00002.safetensors"}
    for name, file in names.items():
        save_file({name: torch.randn(rows, 8)}, source / file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return sorted(names.values())


def test_writes_a_bard_checkpoint(source, tokenizer, tmp_path):
    target = tmp_path / "deep" / "bard"
    report = convert(source, target, block_size=8, context_attention="causal")
    config = BardVLConfig.from_pretrained(target)
    assert config.architectures == ["BardVLForConditionalGeneration"]
    assert config.model_type == "bard_vl"
    assert (config.block_size, config.context_attention) == (8, "causal")
    assert config.mask_token_id == report.mask_token_id == max(tokenizer.get_vocab().values()) + 1
    assert config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.decode(config.assistant_header_ids) == "<|im_start|>assistant\n"
    assert config.text_config.rope_parameters["rope_theta"] == 5000000
    generation = json.loads((target / "generation_config.json").read_text())
    assert "do_sample" not in generation
    assert BardGenerationConfig.from_pretrained(target).pad_token_id == tokenizer.pad_token_id
    assert (target / "processor_config.json").read_bytes() == (source / "processor_config.json").read_bytes()
    assert report.left_out == ["README.md"]


def test_links_a_single_file(source, tmp_path):
    report = convert(source, tmp_path / "bard")
    assert (report.linked, report.copied) == (1, 0)
    assert (tmp_path / "bard/model.safetensors").samefile(source / "model.safetensors")


def test_links_through_symbolic_links(source, tmp_path):
    (source / "model.safetensors").rename(tmp_path / "blob")
    (source / "model.safetensors").symlink_to(tmp_path / "blob")
    convert(source, tmp_path / "bard")
    assert not (tmp_path / "bard/model.safetensors").is_symlink()
    assert (tmp_path / "bard/model.safetensors").samefile(tmp_path / "blob")


def test_copies_shards_where_links_are_impossible(source, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    shards = shard(source)
    monkeypatch.setattr("nemo_bard.base.files.os.link", refuse)
    report = convert(source, tmp_path / "bard")
    assert (report.linked, report.copied) == (0, 2)
    for name in [*shards, "model.safetensors.index.json"]:
        assert (tmp_path / "bard" / name).read_bytes() == (source / name).read_bytes()
        assert not (tmp_path / "bard" / name).samefile(source / name)


def test_link_or_copy_says_which(tmp_path):
    (tmp_path / "a").write_bytes(b"weights")
    assert link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"weights"


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_rope_is_spelled_for_both_versions(spelling):
    scaling = ROPE_4_57["rope_scaling"]
    text = {"rope_parameters": {**scaling, "rope_theta": 5000000}} if spelling == "rope_parameters" else dict(ROPE_4_57)
    spell_rope_twice(text)
    assert text == {**ROPE_4_57, "rope_parameters": {**scaling, "rope_theta": 5000000}}


@pytest.mark.parametrize(
    ("wanted", "rows", "taken", "expected"),
    [(None, 151936, 151668, 151671), (None, 151936, 151671, 151672), (None, 576, 549, 550), (560, 576, 549, 560)],
)
def test_choice_of_the_mask_token(wanted, rows, taken, expected):
    assert choose_mask_token_id(wanted, rows, frozenset(range(taken + 1))) == expected


@pytest.mark.parametrize(
    ("wanted", "rows", "message"),
    [
        (576, 576, "mask_token_id 576 lies outside the embedding; allowed: 550 to 575"),
        (-1, 576, "mask_token_id -1 lies outside the embedding; allowed: 550 to 575"),
        (549, 576, "mask_token_id 549 is a token of the tokenizer; allowed: 550 to 575"),
        (None, 550, "none is left"),
    ],
)
def test_refused_mask_tokens(wanted, rows, message):
    with pytest.raises(ValueError, match=message):
        choose_mask_token_id(wanted, rows, frozenset(range(550)))


def drop_config(source):
    (source / "config.json").unlink()


def other_architecture(source):
    edit_config(source, model_type="llama", architectures=["LlamaForCausalLM"])


def mixture_of_experts(source):
    edit_config(source, architectures=["Qwen3VLMoeForConditionalGeneration"])


def broken_json(source):
    (source / "config.json").write_text("{")


def no_weights(source):
    (source / "model.safetensors").unlink()


def cut_weights(source):
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[:-1])


def no_safetensors(source):
    (source / "model.safetensors").write_bytes(b"pickle")


def lost_shard(source):
    (source / shard(source)[1]).unlink()


def index_leads_out(source):
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')


def other_vocabulary(source):
    text = json.loads((source / "config.json").read_text())["text_config"]
    edit_config(source, text_config={**text, "vocab_size": text["vocab_size"] - 1})


def no_chat_tokens(source):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = source / name
        path.write_text(path.read_text().replace("<|im_end|>", "<|over|>"))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (drop_config, FileNotFoundError, "has no config.json"),
        (shutil.rmtree, FileNotFoundError, "no such folder"),
        (broken_json, ValueError, "config.json: not a JSON file"),
        (other_architecture, ValueError, "LlamaForCausalLM.*allowed: Qwen3VLForConditionalGeneration"),
        (
            mixture_of_experts,
            ValueError,
            "Qwen3VLMoeForConditionalGeneration.*mixture-of-experts layers.*allowed: Qwen3VLForConditionalGeneration",
        ),
        (no_weights, FileNotFoundError, "weights must be safetensors"),
        (cut_weights, ValueError, "model.safetensors: has .* bytes, its header promises"),
        (no_safetensors, ValueError, "model.safetensors: not a safetensors file"),
        (lost_shard, FileNotFoundError, "model-00002-of-00002.safetensors: missing weight file"),
        (index_leads_out, ValueError, "is no file name"),
        (other_vocabulary, ValueError, "rows, text_config.vocab_size is"),
        (no_chat_tokens, ValueError, "tokenizer has no <|im_end|>".replace("|", r"\|")),
    ],
)
def test_bad_source_is_refused_and_nothing_written(source, tmp_path, damage, error, message):
    damage(source)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=message):
        convert(source, tmp_path / "bard")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 0}, "block_size must be an integer >= 1, got 0"),
        ({"context_attention": "full"}, "context_attention"),
        ({"mask_token_id": 0}, "mask_token_id 0 is a token of the tokenizer; allowed: "),
    ],
)
def test_bad_arguments_are_refused_and_nothing_written(source, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "bard", **arguments)
    assert sorted(tmp_path.iterdir()) == [source]


def test_failure_while_writing_leaves_nothing(source, tmp_path, monkeypatch):
    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nemo_bard.checkpoints.convert.check_loads", fail)
    with pytest.raises(OSError, match="No space left"):
        convert(source, tmp_path / "bard")
    assert sorted(tmp_path.iterdir()) == [source]


def test_existing_target(source, tmp_path):
    target = tmp_path / "bard"
    convert(source, target, block_size=4)
    with pytest.raises(FileExistsError, match="exists; give --overwrite"):
        convert(source, target, block_size=8)
    assert json.loads((target / "config.json").read_text())["block_size"] == 4
    convert(source, target, block_size=8, overwrite=True)
    assert json.loads((target / "config.json").read_text())["block_size"] == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bard", "source"]


def test_overwrite_spares_what_is_no_bard_checkpoint(source, tmp_path):
    target = tmp_path / "home"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="is no BARD checkpoint"):
        convert(source, target, overwrite=True)
    for over_source in (source, tmp_path):
        with pytest.raises(ValueError, match="DST must not be SRC"):
            convert(source, over_source, overwrite=True)
    assert (target / "thesis.txt").read_text() == "years of work"


def test_command_line(source, tmp_path, capsys):
    words = ["convert", str(source), str(tmp_path / "bard"), "--block-size", "8", "--context-attention", "causal"]
    assert main(words) == 0
    assert "block size 8" in capsys.readouterr().out
    assert main(words) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'bard'}: exists; give --overwrite or another DST\n"
    assert main([*words, "--overwrite", "--mask-token-id", "100000"]) == 2
    assert "mask_token_id 100000 lies outside the embedding; allowed: " in capsys.readouterr().err
