"""LoRA stages as adapters on one frozen base: what is written, decoded with, and refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from lora_chain import LoraRun
from safetensors.torch import load_file, save_file

from nemo_bard.checkpoints.adapters import export_adapters
from nemo_bard.checkpoints.convert import convert
from nemo_bard.checkpoints.merge import merge
from nemo_bard.checkpoints.tiny import make_tiny_qwen3_vl
from nemo_bard.cli.app import main
from nemo_bard.generation.adapter_folders import adapter_names, weights_digest

PATHS = [{}, {"decode_path": "plain"}, {"decode_path": "graph"}, {"remasking_strategy": "self_speculative"}]
PROMPT = {"input_ids": torch.tensor([[5, 6, 7, 8, 9], [11, 12, 13, 14, 15]]), "attention_mask": torch.ones(2, 5).long()}
CALL = {"max_new_tokens": 11, "eos_token_id": -1}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_tiny_qwen3_vl(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def run(source, tmp_path_factory):
    """Stages at B = 4 and 8 with adapters of different ranks, scales and layers, on a causal start point."""
    folder = tmp_path_factory.mktemp("run")
    convert(source, folder / "start", block_size=4, context_attention="causal")
    run = LoraRun(folder / "run", folder / "start")
    run.add("pbm_b4", block_size=4, seed=1)
    run.add("pbm_b8", block_size=8, seed=2, rank=2, alpha=3, projections=("self_attn.q_proj", "mlp.up_proj"))
    return run.folder


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    target = tmp_path_factory.mktemp("exported") / "adapted"
    export_adapters(run, target)
    return target


@pytest.fixture(scope="module")
def model(folder):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder).eval()


def load(folder, **more):
    from nemo_bard import BardVLForConditionalGeneration

    return BardVLForConditionalGeneration.from_pretrained(folder, **more).eval()


# ------------------ what is written ------------------
def test_the_folder_has_the_base_and_an_adapter_for_each_stage(run, folder):
    base = load_file(run / "start" / "export" / "model.safetensors")
    assert all(weight.equal(base[name]) for name, weight in load_file(folder / "model.safetensors").items())
    assert adapter_names(folder) == ["b4", "b8"]
    config = json.loads((folder / "adapters" / "b8" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (6, 6, "../..")
    assert "model.language_model.layers.0.mlp.up_proj" in config["target_modules"], "of the second stage alone"
    assert "model.language_model.layers.0.mlp.down_proj" in config["target_modules"], "of the first stage alone"
    facts = json.loads((folder / "adapters" / "b8" / "bard_adapter.json").read_text())
    assert facts["stages"] == ["pbm_b4", "pbm_b8"]
    assert facts["base"] == {"name": "stage start of run", "digest": weights_digest(folder)}
    saved = json.loads((folder / "generation_config.json").read_text())
    assert saved["remasking_strategy"] == "autoregressive"
    card = (folder / "README.md").read_text()
    assert "| `b8` | pbm_b8 | 8 | 6 |" in card
    assert 'model.generate(batch, adapter="b8")' in card


def test_a_digest_is_that_of_weights_not_of_their_type_or_files(run, folder, tmp_path):
    export_adapters(run, tmp_path / "half", dtype="bfloat16", max_shard_size="300KB", stages=["pbm_b8"])
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 1
    assert adapter_names(tmp_path / "half") == ["b8"]
    assert weights_digest(tmp_path / "half") == weights_digest(folder)
    assert weights_digest(run / "pbm_b4" / "export") != weights_digest(folder), "merged weights are others"
    half = load(tmp_path / "half", dtype=torch.bfloat16)
    assert half.generate(PROMPT, adapter="b8", **CALL).shape == (2, 11)


@pytest.mark.parametrize("name", ["b4", "b8"])
def test_an_adapter_merges_into_the_stage_again(run, folder, tmp_path, name, capsys):
    assert main(["merge", str(folder / "adapters" / name), str(tmp_path / "whole")]) == 0
    stage = run / f"pbm_{name}" / "export"
    found, expected = load_file(tmp_path / "whole" / "model.safetensors"), load_file(stage / "model.safetensors")
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-6, atol=1e-6)
    configs = [json.loads((place / "config.json").read_text()) for place in (tmp_path / "whole", stage)]
    for key in ("block_size", "context_attention", "mask_token_id", "assistant_header_ids"):
        assert configs[0][key] == configs[1][key]
    saved = json.loads((tmp_path / "whole" / "generation_config.json").read_text())
    assert saved["block_size"] == int(name[1:])
    assert "remasking_strategy" not in saved, "block diffusion, as the adapter"
    assert main(["export", str(folder / "adapters" / name), str(tmp_path / "exported")]) == 0
    whole = load_file(tmp_path / "exported" / "model.safetensors")
    assert all(whole[key].equal(weight) for key, weight in found.items())


def test_stages_of_one_block_size_have_their_own_names(run, source, tmp_path):
    convert(source, tmp_path / "start", block_size=4, context_attention="block")
    other = LoraRun(tmp_path / "run", tmp_path / "start")
    other.add("pbm_b8", block_size=8)
    other.add("swd_b8", block_size=8, seed=3)
    export_adapters(other.folder, tmp_path / "adapted")
    assert adapter_names(tmp_path / "adapted") == ["pbm_b8", "swd_b8"]
    model = load(tmp_path / "adapted")
    with pytest.raises(ValueError, match="needs a checkpoint with context_attention: causal, .* one of its adapters"):
        model.generate(PROMPT, **CALL)
    expected = load(other.folder / "swd_b8" / "export").generate(PROMPT, **CALL)
    assert model.generate(PROMPT, adapter="swd_b8", **CALL).equal(expected)


# ------------------ decoding ------------------
@pytest.mark.parametrize("name", ["b4", "b8"])
def test_base_and_adapter_give_what_the_merged_stage_gives(run, model, name):
    """Logits within 1e-4 (products in another order, float32), the same tokens, on every path."""
    from nemo_bard.generation.adapters import load_adapter
    from nemo_bard.upstream.views import view

    merged = load(run / f"pbm_{name}" / "export")
    adapter = load_adapter(model, name)
    seen = view(model, model.decoding_attention, replacements=adapter.replacements())
    call = {
        "input_ids": torch.arange(24).view(2, 12) + 5,
        "attention_mask": torch.ones(2, 1, 12, 12, dtype=torch.bool),
        "position_ids": torch.arange(12).expand(3, 2, 12),
    }
    with torch.no_grad():
        expected = merged(**call).logits
        torch.testing.assert_close(seen(**call).logits, expected, rtol=1e-4, atol=1e-4)
        assert (model(**call).logits - expected).abs().max() > 0.1, "the adapter says something"
    for path in PATHS:
        assert model.generate(PROMPT, adapter=name, **CALL, **path).equal(merged.generate(PROMPT, **CALL, **path)), path
    assert adapter.block_size == int(name[1:])
    assert load_adapter(model, name) is adapter, "read once"


def test_without_an_adapter_the_source_answers(source, model):
    from transformers import Qwen3VLForConditionalGeneration

    before = {name: weight.clone() for name, weight in model.named_parameters()}
    theirs = Qwen3VLForConditionalGeneration.from_pretrained(source).eval()
    with torch.no_grad():
        expected = theirs.generate(
            **PROMPT, max_new_tokens=11, do_sample=False, eos_token_id=None, pad_token_id=0, temperature=None
        )[:, 5:]
    alone = {name: model.generate(PROMPT, adapter=name, **CALL) for name in (None, "b4", "b8")}
    assert alone[None].equal(expected)
    assert model.generate(PROMPT, **CALL).equal(expected)
    jobs = [(None, "b4", "b8")[turn % 3] for turn in range(9)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda name: model.generate(PROMPT, adapter=name, **CALL), jobs))
    assert all(ids.equal(alone[name]) for name, ids in zip(jobs, found, strict=True))
    assert all(weight.equal(before[name]) for name, weight in model.named_parameters())
    graphs = [model.generate(PROMPT, adapter=name, decode_path="graph", **CALL) for name in ("b4", "b8", "b4")]
    assert [ids.equal(alone[name]) for name, ids in zip(("b4", "b8", "b4"), graphs, strict=True)] == [True] * 3


ALONE = """
import json, sys
sys.modules.update(nemo_bard=None, nemo_automodel=None)
import torch
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
prompt, call = {name: torch.tensor(ids) for name, ids in json.loads(sys.argv[2]).items()}, json.loads(sys.argv[3])
print(json.dumps([model.generate(prompt, adapter=name, **call).tolist() for name in (None, "b8")]))
"""


def test_the_code_that_a_folder_brings_along_has_adapters(run, model, tmp_path):
    """Without this package and NeMo AutoModel."""
    export_adapters(run, tmp_path / "alone", self_contained=True)
    prompt = {name: ids.tolist() for name, ids in PROMPT.items()}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path / "alone", json.dumps(prompt), json.dumps(CALL)],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = [model.generate(PROMPT, adapter=name, **CALL).tolist() for name in (None, "b8")]
    assert json.loads(done.stdout) == expected


def test_settings_of_a_call_and_of_an_adapter(model, folder, recwarn):
    from nemo_bard.generation.adapters import adapter_settings, call_settings
    from nemo_bard.generation.settings import BardGenerationConfig

    assert adapter_settings(folder, "b8").block_size == 8
    assert call_settings(model, None) is model.generation_config
    full = model.generate(PROMPT, adapter="b8", return_dict_in_generate=True, **CALL)
    assert full.block_step_counts.shape == (2, 2), "two blocks of 8"
    mine = BardGenerationConfig(adapter="b8", max_new_tokens=11, eos_token_id=-1)
    assert model.generate(PROMPT, mine).equal(full.sequences), "a block size that nobody gives is the adapter's"
    assert not [w for w in recwarn if "block_size" in str(w.message)]
    with pytest.warns(UserWarning, match="block_size=4 differs from 8"):
        model.generate(PROMPT, adapter="b8", block_size=4, **CALL)


# ------------------ bad input ------------------
def damaged(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def of_other_weights(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file({name: weight * 1.01 for name, weight in weights.items()}, file, metadata={"format": "pt"})


def without_facts(folder):
    (folder / "adapters" / "b8" / "bard_adapter.json").unlink()


def without_weights(folder):
    (folder / "adapters" / "b8" / "adapter_model.safetensors").unlink()


def of_another_layer(folder):
    file = folder / "adapters" / "b8" / "adapter_model.safetensors"
    save_file({name.replace("layers.0", "layers.9"): weight for name, weight in load_file(file).items()}, file)


def of_another_shape(folder):
    file = folder / "adapters" / "b8" / "adapter_model.safetensors"
    save_file({name: weight[:, :-1].contiguous() for name, weight in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (of_other_weights, "b8: is an adapter of stage start of run, and the weights of .* are others"),
        (without_facts, "b8: has no bard_adapter.json"),
        (without_weights, "b8: has no adapter_model.safetensors"),
        (of_another_layer, "adapter of model.language_model.layers.9.*, which this model lacks"),
        (of_another_shape, "the adapter of .* is .* its weight"),
    ],
)
def test_a_damaged_adapter_is_refused_in_one_line(folder, tmp_path, damage, message):
    copy = damaged(folder, tmp_path)
    damage(copy)
    model = load(copy)
    with pytest.raises(ValueError, match=message) as caught:
        model.generate(PROMPT, adapter="b8", **CALL)
    assert "\n" not in str(caught.value)


def test_a_model_that_has_changed_since_it_was_loaded(folder):
    model = load(folder)
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.down_proj.weight.mul_(1.1)
    with pytest.raises(ValueError, match="mlp.down_proj.weight of this model is not what .* has"):
        model.generate(PROMPT, adapter="b8", **CALL)


def test_names_that_are_not_there(model, golden_model):
    with pytest.raises(ValueError, match="adapter must be one of b4, b8, got 'b88' \\(did you mean 'b8'\\?\\)"):
        model.generate(PROMPT, adapter="b88", **CALL)
    with pytest.raises(ValueError, match="adapter='b4': .*tiny_tied has no adapters"):
        golden_model("tiny_tied").generate(PROMPT, adapter="b4", **CALL)


def test_merging_into_another_base(run, folder, tmp_path):
    with pytest.raises(ValueError, match="b8: is an adapter of stage start of run"):
        merge(folder / "adapters" / "b8", tmp_path / "whole", base=run / "pbm_b4" / "export")
    assert not (tmp_path / "whole").exists()


def test_what_cannot_be_exported(run, source, tmp_path, capsys):
    def refused(words, message):
        assert main(["export", *map(str, words), str(tmp_path / "out"), "--adapter"]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert len(said.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()

    refused([run, "--stage", "start"], "stage start: was trained without adapters (peft)")
    refused([run, "--stage", "pbm_b9"], "--stage must be one of start, pbm_b4, pbm_b8, got 'pbm_b9'")
    refused([run, "--base", run / "pbm_b4" / "export"], "do not give")
    gone = shutil.copytree(run, tmp_path / "gone")
    shutil.rmtree(gone / "pbm_b4" / "checkpoints")
    refused([gone], "was trained with adapters, and no checkpoint there has them")
    mixed = shutil.copytree(run, tmp_path / "mixed")
    file = mixed / "pbm_b8" / "checkpoints" / "epoch_0_step_1" / "config.yaml"
    file.write_text(file.read_text().replace("block_size: 8", "block_size: 8\n  context_attention: block"))
    refused([mixed], "context_attention='block', stage pbm_b4 with 'causal'")
    assert main(["export", str(run), str(tmp_path / "out"), "--stage", "pbm_b4", "--stage", "pbm_b8"]) == 2
    assert "--stage may be given once without --adapter" in capsys.readouterr().err


def test_adapters_that_are_left_behind_are_named(folder, tmp_path, capsys):
    assert main(["export", str(folder), str(tmp_path / "base")]) == 0
    assert "not taken over: the adapters b4, b8" in capsys.readouterr().out


# ------------------ commands and server ------------------
def test_the_command_line_decodes_with_an_adapter(run, folder, capsys):
    words = ["--prompt", "Read.", "--max-new-tokens", "9", "--device", "cpu"]
    assert main(["generate", "--model", str(folder), "--adapter", "b8", *words]) == 0
    found = capsys.readouterr().out
    assert main(["generate", "--model", str(run / "pbm_b8" / "export"), *words]) == 0
    assert found == capsys.readouterr().out
    assert main(["generate", "--model", str(folder), "--adapter", "b16", *words]) == 2
    assert "adapter must be one of b4, b8, got 'b16'" in capsys.readouterr().err


def test_the_local_server_has_a_model_for_each_adapter(folder):
    pytest.importorskip("fastapi", reason="needs nemo-bard[serve]")
    from local_server import ask, request, serving

    from nemo_bard.data.encode import encode_prompts
    from nemo_bard.evaluation.responder import load_checkpoint

    model, processor = load_checkpoint(folder, device="cpu")
    batch = encode_prompts(processor, [[{"role": "user", "content": [{"type": "text", "text": "Read."}]}]])
    with serving(model, processor) as port:
        _, _, listed = request(port, None, path="/v1/models", method="GET")
        assert [card["id"] for card in listed["data"]] == ["tiny", "tiny:b4", "tiny:b8"]
        for name, adapter in (("tiny", None), ("tiny:b8", "b8")):
            status, _, answer = request(port, ask("Read.", model=name))
            ids = model.generate(batch, max_new_tokens=12, adapter=adapter)
            assert (status, answer["model"]) == (200, name)
            text = processor.tokenizer.decode(ids[0], skip_special_tokens=True)
            assert answer["choices"][0]["message"]["content"] == text
        _, _, facts = request(port, None, path="/v1/bard?model=tiny:b8", method="GET")
        assert (facts["block_size"], facts["models"]) == (8, ["tiny", "tiny:b4", "tiny:b8"])
        status, _, error = request(port, ask("Read.", model="tiny:b9"))
        assert status == 404
        assert "'tiny:b4', 'tiny:b8'" in error["error"]["message"]
        status, _, error = request(port, ask("Read.", adapter="b8"))
        assert status == 400
        assert "such as NAME:b32" in error["error"]["message"]
