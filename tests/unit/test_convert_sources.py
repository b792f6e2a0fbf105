"""``convert`` from hub names, from Bard-VL checkpoints, and what it refuses by name."""

import json
import shutil

import pytest
from huggingface_hub import constants

from nemo_bard.checkpoints.convert import convert
from nemo_bard.checkpoints.hub import check_hub_name, is_hub_name
from nemo_bard.checkpoints.tiny import make_tiny_qwen3_vl
from nemo_bard.cli.app import main
from nemo_bard.generation.settings import BardGenerationConfig

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return make_tiny_qwen3_vl(tmp_path_factory.mktemp("tiny") / "qwen")


@pytest.fixture
def cache(qwen, tmp_path, monkeypatch):
    """A hub cache that holds ``org/tiny`` at ``main`` and ``v1``, and no network."""
    repository = tmp_path / "cache/models--org--tiny"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / COMMIT
    for folder in (blobs, snapshot, repository / "refs"):
        folder.mkdir(parents=True)
    for file in qwen.iterdir():
        shutil.copyfile(file, blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    for revision in ("main", "v1"):
        (repository / "refs" / revision).write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repository


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def edit_config(folder, **changes):
    values = {key: value for key, value in {**config_of(folder), **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("name", ["org/tiny", "org/tiny@v1", f"org/tiny@{COMMIT}"])
def test_hub_name_in_the_cache(cache, tmp_path, name):
    report = convert(name, tmp_path / "bard")
    assert report.linked == 1  # the blob itself, not the symbolic link to it
    weights = tmp_path / "bard/model.safetensors"
    assert not weights.is_symlink()
    assert weights.samefile(cache / "blobs/model.safetensors")


def test_hub_name_on_the_command_line(cache, tmp_path, capsys):
    assert main(["convert", "org/tiny", str(tmp_path / "bard"), "--block-size", "8"]) == 0
    assert "block size 8" in capsys.readouterr().out
    assert main(["convert", "org/other", str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err
    assert error == (
        "error: SRC=org/other: not in the Hugging Face cache and cannot be downloaded (HF_HUB_OFFLINE is set: unset it to"
        " download)\n"
    )
    assert main(["convert", "org/tiny@v2", str(tmp_path / "other")]) == 2
    assert "SRC=org/tiny@v2: not in the Hugging Face cache" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_cache_that_lost_its_weights(cache, tmp_path):
    (cache / "blobs/model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"weights must be safetensors|missing weight file"):
        convert("org/tiny", tmp_path / "bard")
    assert not (tmp_path / "bard").exists()


def test_weights_of_a_wrong_model_are_not_fetched(cache, tmp_path, monkeypatch):
    (cache / "blobs/config.json").write_text(json.dumps({"model_type": "qwen3_vl_moe"}))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("fetched weights"))
    with pytest.raises(ValueError, match="mixture-of-experts"):
        convert("org/tiny", tmp_path / "bard")


def test_what_is_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert is_hub_name("Qwen/Qwen3-VL-4B-Instruct")
    assert is_hub_name("Qwen/Qwen3-VL-4B-Instruct@refs/pr/7")
    for text in ("models/tiny", "./a/b", "/a/b", "~/a", "a/b/c", "a", "../a", "a/b@", ""):
        assert not is_hub_name(text), text
    with pytest.raises(ValueError, match="model.source=models/tiny is neither a folder nor a Hugging Face name"):
        check_hub_name("model.source", "models/tiny")
    with pytest.raises(FileNotFoundError, match="models/tiny: no such folder"):
        convert("models/tiny", tmp_path / "bard")


@pytest.mark.parametrize(
    ("model_type", "architecture", "message"),
    [
        ("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", "mixture-of-experts layers: BARD has no model class"),
        ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", "another vision tower .window attention"),
        ("qwen2_vl", "Qwen2VLForConditionalGeneration", "another vision tower .no deepstack"),
        ("qwen3", "Qwen3ForCausalLM", "a text model, without a vision tower"),
        ("qwen3_moe", "Qwen3MoeForCausalLM", "mixture-of-experts"),
        ("qwen3_5", "Qwen3_5ForConditionalGeneration", "linear attention"),
        ("gemma3", "Gemma3ForConditionalGeneration", "cannot be converted; allowed: Qwen3VLForConditionalGeneration"),
        ("bard_vl", "SomethingElse", "architecture SomethingElse .model_type 'bard_vl'. cannot be converted; allowed"),
    ],
)
def test_other_models_are_refused_by_name(tmp_path, model_type, architecture, message):
    (tmp_path / "source").mkdir()
    config = {"model_type": model_type, "architectures": [architecture]}
    (tmp_path / "source/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        convert(tmp_path / "source", tmp_path / "bard")
    assert architecture in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.fixture
def released(qwen, tmp_path):
    """A Bard-VL folder as it was released: transformers 4.57's spelling, none of our fields."""
    folder = shutil.copytree(qwen, tmp_path / "released")
    config = config_of(folder)
    text, vision = dict(config["text_config"]), dict(config["vision_config"])
    rope = text.pop("rope_parameters")
    text |= {"model_type": "bard_vl_text", "rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    vision["model_type"] = "bard_vl"
    edit_config(
        folder,
        model_type="bard_vl",
        architectures=["BardVLForConditionalGeneration"],
        text_config=text,
        vision_config=vision,
        transformers_version="4.57.3",
        eos_token_id=None,
    )
    return folder


def test_released_checkpoint_needs_what_it_does_not_say(released, tmp_path):
    with pytest.raises(
        ValueError, match=r"has no block_size; give the one that SRC was trained with \(--block-size N\)"
    ):
        convert(released, tmp_path / "bard")
    with pytest.raises(ValueError, match="has no mask_token_id; give the one .*--mask-token-id N"):
        convert(released, tmp_path / "bard", block_size=32)
    assert not (tmp_path / "bard").exists()


def test_released_checkpoint_becomes_a_bard_folder(released, tmp_path):
    import torch

    from nemo_bard.model.modeling import BardVLForConditionalGeneration

    report = convert(released, tmp_path / "bard", block_size=4, mask_token_id=550)
    config = config_of(tmp_path / "bard")
    assert (config["block_size"], config["mask_token_id"], config["context_attention"]) == (4, 550, "block")
    assert report.notes == ()
    model = BardVLForConditionalGeneration.from_pretrained(tmp_path / "bard")
    ids = torch.tensor([[65, *config["assistant_header_ids"]]])  # a block: whether they are known makes no difference
    answer = model.generate(ids, max_new_tokens=8)
    before = BardVLForConditionalGeneration.from_pretrained(released)
    options = {"max_new_tokens": 8, "block_size": 4, "mask_token_id": 550, "eos_token_id": config["eos_token_id"]}
    assert torch.equal(answer, before.generate(ids, **options))


def test_full_vocabulary_gives_the_released_mask():
    from nemo_bard.checkpoints.convert import bard_values, trained_values

    config = {"model_type": "bard_vl", "text_config": {"vocab_size": 151936}, "vision_config": {}}
    trained = trained_values("released", config)
    values, _ = bard_values("released", trained, {"block_size": 32, "mask_token_id": None, "context_attention": None})
    assert (values["mask_token_id"], values["eos_token_id"], values["block_size"]) == (151671, 151645, 32)
    assert values["assistant_header_ids"] == [151644, 77091, 198]


def test_bard_folder_keeps_what_it_was_trained_with(qwen, tmp_path):
    convert(qwen, tmp_path / "first", block_size=8, context_attention="causal", mask_token_id=553)
    BardGenerationConfig(confidence_threshold=0.7, pad_token_id=3).save_pretrained(tmp_path / "first")
    edit_config(tmp_path / "first", auto_map={"AutoConfig": "code.BardVLConfig"})
    report = convert(tmp_path / "first", tmp_path / "second")
    assert report.notes == ()
    first, second = config_of(tmp_path / "first"), config_of(tmp_path / "second")
    assert first.pop("auto_map")
    assert first == second
    assert BardGenerationConfig.from_pretrained(tmp_path / "second").confidence_threshold == 0.7
    assert (tmp_path / "first/tokenizer.json").read_bytes() == (tmp_path / "second/tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match="mask_token_id 552: SRC was trained with 553; leave it out"):
        convert(tmp_path / "first", tmp_path / "third", mask_token_id=552)


def test_bard_folder_for_the_next_stage(qwen, tmp_path, capsys):
    convert(qwen, tmp_path / "first", block_size=4)
    BardGenerationConfig(confidence_threshold=0.7, pad_token_id=3).save_pretrained(tmp_path / "first")
    words = ["convert", str(tmp_path / "first"), str(tmp_path / "second"), "--block-size", "8"]
    assert main([*words, "--context-attention", "causal"]) == 0
    said = capsys.readouterr().out
    assert "block_size changed from 4 to 8: train the next stage" in said
    assert "context_attention changed from block to causal: its context was trained otherwise" in said
    assert "decode settings of SRC were for another block size and are left out" in said
    config = config_of(tmp_path / "second")
    assert (config["block_size"], config["context_attention"]) == (8, "causal")
    generation = BardGenerationConfig.from_pretrained(tmp_path / "second")
    assert (generation.confidence_threshold, generation.pad_token_id) == (
        BardGenerationConfig().confidence_threshold,
        3,
    )
