"""``nemo-bard export``: what it finds, what it writes, what it refuses, and that it never holds much."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nemo_bard.checkpoints.convert import convert
from nemo_bard.checkpoints.exporting import places, writing
from nemo_bard.checkpoints.exporting.export import export
from nemo_bard.checkpoints.exporting.facts import read_facts
from nemo_bard.checkpoints.exporting.weights import expected_shapes
from nemo_bard.checkpoints.tiny import make_tiny_qwen3_vl
from nemo_bard.cli.app import main
from nemo_bard.generation.settings import BardGenerationConfig

STEPS = 20


def load_all(folder):
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= load_file(file)
    return found


def write_shards(weights, model, ranks=2):
    """Weights as the ranks of a training run write them: dealt out by rows."""
    model.mkdir(parents=True)
    for rank in range(ranks):
        pieces, offsets = {}, {}
        for name, weight in weights.items():
            rows = weight.chunk(ranks)
            if rank < len(rows):
                pieces[name] = rows[rank].clone()
                offsets[name] = {"saved_offsets": [rank * len(rows[0]), *[0] * (weight.dim() - 1)]}
        metadata = {"format": "pt", "DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0"}
        save_file(pieces, model / f"shard-{rank + 1:05}-model-00001-of-00001.safetensors", metadata=metadata)


def write_checkpoint(start, folder, *, step=STEPS - 1, ranks=2, **recipe):
    """A training checkpoint with sharded weights, and the run's metrics around it."""
    checkpoint = folder / f"epoch_0_step_{step}"
    write_shards(load_all(start), checkpoint / "model", ranks)
    shutil.copytree(start, checkpoint / "model" / ".hf_metadata", ignore=shutil.ignore_patterns("*.safetensors*"))
    section = {
        "recipe": "nemo_bard.train.pbm.PBMRecipe",
        "model": {"pretrained_model_name_or_path": str(start), "block_size": 4},
        "step_scheduler": {"global_batch_size": 8},
        "optimizer": {"lr": 0.001},
        "dataset": {"_target_": "nemo_bard.data.make_digits", "split": "train", "rows": 4},
        **recipe,
    }
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(section, sort_keys=False))
    lines = [{"step": n, "loss": 1 / (n + 1), "num_samples": 8, "num_loss_tokens": 50} for n in range(STEPS)]
    (folder / "training.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return checkpoint


def write_stage(run, name, start, *, content, init=None, finished=True, scores=None, **recipe):
    """A stage of a chain, with its checkpoint."""
    stage = run / name
    checkpoint = write_checkpoint(start, stage / "checkpoints", **recipe)
    shutil.copyfile(checkpoint / "config.yaml", stage / "stage.yaml")
    record = {
        "stage": name,
        "export": f"{name}/export",
        "content": content,
        "config": {"kind": "recipe"},
        "versions": {"nemo-bard": "0.0.9", "torch": "2.0"},
        "inputs": {"init": {"content": init}},
    }
    (stage / "started.json").write_text(json.dumps(record))
    if scores is not None:
        (stage / "eval.json").write_text(json.dumps({"samples": [], "num_samples": 64, "tpf": 3.5, "scores": scores}))
    if finished:
        shutil.copytree(start, stage / "export")
        (stage / "manifest.json").write_text(json.dumps(record))
    return stage


@pytest.fixture(scope="module")
def run(start, tmp_path_factory):
    """A chain's run folder: two finished stages, one that was cut off, one that has not begun."""
    run = tmp_path_factory.mktemp("run") / "run"
    first = write_stage(run, "first", start, content="1", init="0", scores={"exact_match": 0.5})
    write_stage(run, "second", start, content="2", init="1", model={"block_size": 8}, scores={"exact_match": 0.75})
    write_stage(run, "third", start, content="3", init="2", finished=False)
    (run / "pipeline.json").write_text(
        json.dumps({"pipeline": "mine", "stages": ["first", "second", "third", "fourth"]})
    )
    composed = {"name": "mine", "evaluation": {"data": "digits:test"}, "model": {"source": "Qwen/Qwen3-VL-2B-Instruct"}}
    (run / "pipeline.yaml").write_text(yaml.safe_dump(composed))
    assert first.is_dir()
    return run


@pytest.fixture(autouse=True)
def _no_syncing(monkeypatch):
    """Tests do not wait for the disk."""
    monkeypatch.setattr("nemo_bard.checkpoints.exporting.export.sync_tree", lambda _: None)


# ------------------ what is found ------------------
def test_what_a_user_may_name(run, start):
    assert places.find(run).folder == run / "second" / "export"
    assert places.find(run, "first").folder == run / "first" / "export"
    assert places.find(run / "first").folder == run / "first" / "export"
    assert places.find(start).kind == places.FOLDER
    checkpoint = run / "third" / "checkpoints" / f"epoch_0_step_{STEPS - 1}"
    for named in (checkpoint, checkpoint / "model", checkpoint.parent):
        found = places.find(named)
        assert found.kind == places.SHARDS
        assert found.folder.resolve() == (checkpoint / "model").resolve()
        assert (found.stage, found.run) == ((run / "third").resolve(), run.resolve())


def test_the_latest_whole_checkpoint_counts(start, tmp_path):
    for step in (9, 99, 100):
        write_checkpoint(start, tmp_path / "run", step=step)
    (tmp_path / "run" / "epoch_0_step_100" / ".incomplete").touch()
    assert places.find(tmp_path / "run").checkpoint.name == "epoch_0_step_99"
    (tmp_path / "run" / "LATEST").symlink_to("epoch_0_step_9")
    assert places.find(tmp_path / "run").checkpoint.name == "epoch_0_step_9"


# ------------------ what is written ------------------
def test_weights_are_the_same_bit_by_bit(run, start, tmp_path, capsys):
    """A folder, shards of ranks, and torch's own format; in one file and in several."""
    expected = load_all(start)
    checkpoint = write_checkpoint(start, tmp_path / "dcp")
    for shard in (checkpoint / "model").glob("*.safetensors"):
        shard.unlink()
    torch.distributed.checkpoint.save(expected, checkpoint_id=checkpoint / "model", no_dist=True)
    shutil.rmtree(checkpoint / "model" / ".hf_metadata")
    third = run / "third" / "checkpoints"
    for number, (source, size) in enumerate([(start, "5GB"), (third, "200KB"), (tmp_path / "dcp", "1 MB")]):
        target = tmp_path / f"export{number}"
        assert main(["export", str(source), str(target), "--max-shard-size", size]) == 0
        assert f"wrote {target}: BardVLForConditionalGeneration from" in capsys.readouterr().out
        found = load_all(target)
        assert found.keys() == expected.keys()
        assert all(found[name].equal(weight) for name, weight in expected.items())
        index = target / "model.safetensors.index.json"
        assert index.is_file() == (number != 0)
    biggest = max(weight.nbytes for weight in expected.values())
    for file in (tmp_path / "export1").glob("*.safetensors"):
        assert file.stat().st_size < max(200_000, biggest) + 10_000
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    index = json.loads((tmp_path / "export1" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in expected.values())
    assert index["weight_map"].keys() == expected.keys()


def test_an_export_answers_as_its_source_does(start, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    export(start, tmp_path / "export", max_shard_size="300KB")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert "_name_or_path" not in config
    assert config["text_config"]["rope_theta"] == config["text_config"]["rope_parameters"]["rope_theta"]
    ids = []
    for folder in (start, tmp_path / "export"):
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
        batch = prompt(AutoProcessor.from_pretrained(folder), Image.linear_gradient("L").convert("RGB"))
        ids.append(model.generate(batch, max_new_tokens=12))
    assert ids[0].equal(ids[1])


def prompt(processor, image):
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Read."}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )


def test_a_type_of_its_own(start, tmp_path):
    export(start, tmp_path / "half", dtype="bfloat16")
    expected = load_all(start)
    assert all(weight.equal(expected[name].bfloat16()) for name, weight in load_all(tmp_path / "half").items())
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert {config["dtype"], config["text_config"]["dtype"], config["vision_config"]["dtype"]} == {"bfloat16"}
    export(tmp_path / "half", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16", "auto: as it is"
    with pytest.raises(ValueError, match=r"--dtype float16: \S+ has numbers beyond 65504"):
        writing.cast(torch.tensor([7e4]), torch.float16, "w")


def test_files_of_mixed_types_stay_aligned(start, tmp_path):
    mixed = tmp_path / "mixed"
    shutil.copytree(start, mixed)
    weights = {name: w.bfloat16() if "norm" in name else w for name, w in load_all(start).items()}
    (file,) = mixed.glob("*.safetensors")
    file.unlink()  # a hard link
    save_file(weights, file, metadata={"format": "pt"})
    export(mixed, tmp_path / "export")
    found = load_all(tmp_path / "export")
    assert all(found[name].equal(weight) and found[name].dtype == weight.dtype for name, weight in weights.items())


def test_a_tied_head_is_the_embedding(start, tmp_path):
    doubled = tmp_path / "doubled"
    shutil.copytree(start, doubled)
    weights = load_all(start)
    (file,) = doubled.glob("*.safetensors")
    file.unlink()
    save_file({**weights, "lm_head.weight": weights["model.language_model.embed_tokens.weight"].clone()}, file)
    report = export(doubled, tmp_path / "export")
    assert "lm_head.weight (tied to the embedding)" in str(report)
    assert load_all(tmp_path / "export").keys() == weights.keys()


def test_no_more_than_two_shards_are_in_memory(tmp_path):
    source = make_tiny_qwen3_vl(
        tmp_path / "source", text={"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6},
        vision={"out_hidden_size": 512},
    )  # fmt: skip
    convert(source, tmp_path / "start")
    size, shard = (tmp_path / "start" / "model.safetensors").stat().st_size, 8_000_000
    assert size > 8 * shard
    export(tmp_path / "start", tmp_path / "first")  # imports
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = memory("VmHWM")
    export(tmp_path / "start", tmp_path / "export", max_shard_size=f"{shard // 1000}KB")
    assert len(list((tmp_path / "export").glob("*.safetensors"))) > 8
    assert memory("VmHWM") - before < 2 * shard


def memory(key):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def test_a_calibration_comes_along(start, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(start, folder)
    chosen = {
        "setting": {"block_size": 4, "confidence_threshold": 0.7},
        "score": 0.9,
        "tpf": 3.0,
        "tokens_per_second": 80,
    }
    (folder / "calibration").mkdir()
    (folder / "calibration" / "calibration.json").write_text(json.dumps({"chosen": chosen, "metric": "exact_match"}))
    BardGenerationConfig(confidence_threshold=0.7).save_pretrained(folder / "calibration")
    export(folder, tmp_path / "export")
    assert BardGenerationConfig.from_pretrained(tmp_path / "export").confidence_threshold == 0.7
    card = (tmp_path / "export" / "README.md").read_text()
    assert "confidence_threshold 0.7; exact match 90.0 %, 3.00 tokens per forward, 80 tokens/s" in card


# ------------------ the card ------------------
def test_the_card_tells_what_the_run_knows(run, tmp_path):
    export(run, tmp_path / "bard-2b")
    card = (tmp_path / "bard-2b" / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["pipeline_tag"] == "image-text-to-text"
    assert "license" not in head, "nobody said one"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.splitlines() if line.startswith("| ")]
    assert ["first", "block diffusion (PBM)", "4", "20", "0.001", "8", "160", "1,000", "0.05132"] in rows
    assert ["second", "block diffusion (PBM)", "8", "20", "0.001", "8", "160", "1,000", "0.05132"] in rows
    assert not any("third" in row for row in rows)
    assert ["second", "75.0 %", "3.50"] in rows
    assert "64 samples of `digits:test`" in card
    assert "Trained with nemo-bard 0.0.9, torch 2.0." in card
    assert "`make_digits`, split train, rows 4" in card
    assert str(tmp_path) not in card
    assert str(run) not in card


def test_a_base_model_is_named_where_it_is_known(run, start, tmp_path):
    facts = read_facts(places.find(run))
    assert facts.base_model is None, "the first stage began with a folder"
    assert facts.base_folder == start.name
    model = {"pretrained_model_name_or_path": "Qwen/Qwen3-VL-2B-Instruct", "block_size": 4}
    checkpoint = write_checkpoint(start, tmp_path / "run", model=model)
    assert read_facts(places.find(checkpoint)).base_model == "Qwen/Qwen3-VL-2B-Instruct"
    text = "\n    Apache License\n    Version 2.0, January 2004\n"
    (checkpoint / "model" / ".hf_metadata" / "LICENSE").write_text(text)
    export(checkpoint, tmp_path / "export")
    assert (tmp_path / "export" / "LICENSE").read_text() == text
    card = (tmp_path / "export" / "README.md").read_text()
    assert card.startswith(
        "---\nlicense: apache-2.0\nbase_model: Qwen/Qwen3-VL-2B-Instruct\nbase_model_relation: finetune\n"
    )
    model["pretrained_model_name_or_path"] = str(tmp_path / "export")
    later = write_checkpoint(start, tmp_path / "later", model=model)
    export(later, tmp_path / "again")
    assert (tmp_path / "again" / "LICENSE").read_text() == text
    assert read_facts(places.find(later)).base_model == "Qwen/Qwen3-VL-2B-Instruct", "from the card of its start"


def test_metrics_behind_the_checkpoint_do_not_count(start, tmp_path):
    checkpoint = write_checkpoint(start, tmp_path / "run", step=9)
    (stage,) = read_facts(places.find(checkpoint)).stages
    assert (stage.steps, stage.samples, stage.tokens) == (10, 80, 500)
    lines = (tmp_path / "run" / "training.jsonl").read_text().splitlines()
    (tmp_path / "run" / "training.jsonl").write_text("\n".join(lines[3:]))
    (stage,) = read_facts(places.find(checkpoint)).stages
    assert (stage.steps, stage.samples) == (10, None), "lines are missing: no sum is known"


def test_scores_are_those_of_the_exported_weights(start, tmp_path):
    run = tmp_path / "run"
    stage = write_stage(run, "only", start, content="1", scores={"exact_match": 0.5})
    (run / "pipeline.json").write_text(json.dumps({"pipeline": "mine", "stages": ["only"]}))
    write_checkpoint(start, stage / "checkpoints", step=9)
    for place, scored in (
        (stage, True),
        (stage / "checkpoints", True),
        (stage / "checkpoints" / "epoch_0_step_9", False),
    ):
        (facts,) = read_facts(places.find(place)).stages
        assert (facts.scores is not None) == scored, place


def test_a_mixture_is_told_with_its_counts(start, tmp_path):
    part = {"name": "part-00000.arrow", "rows": 70, "bytes": 1, "sha256": "x"}
    source = {
        "name": "charts",
        "layout": "llava",
        "parts": [part],
        "kept": None,
        "read": 100,
        "rejected": {"image": 10},
    }
    (tmp_path / "prepared").mkdir()
    manifest = {"format": 1, "sources": [{**source, "filtered": {"max_tokens": 20}}, {**source, "name": "other"}]}
    (tmp_path / "prepared" / "manifest.json").write_text(json.dumps(manifest))
    dataset = {
        "_target_": "nemo_bard.data.MixtureDataset",
        "path": str(tmp_path / "prepared"),
        "sources": {"charts": {"weight": 2}},
        "samples": 640,
    }
    checkpoint = write_checkpoint(start, tmp_path / "run", dataset=dataset)
    export(checkpoint, tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text()
    assert "`MixtureDataset`, path prepared, samples 640" in card
    assert "| charts | llava | 70 | 100 | 20 | 10 | weight 2 |" in card
    assert "other" not in card.split("## Generate")[0]


def test_the_code_on_the_card_runs(start, tmp_path, monkeypatch, capsys):
    export(start, tmp_path / "export")
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(tmp_path / "image.png")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "export" / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("max_new_tokens=256", "max_new_tokens=8"), "card", "exec"), {})
    assert capsys.readouterr().out.endswith("\n")


def test_with_its_own_code(start, tmp_path, capsys):
    assert main(["export", str(start), str(tmp_path / "export"), "--self-contained"]) == 0
    assert "with its own code: " in capsys.readouterr().out
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    module = config["auto_map"]["AutoModelForImageTextToText"].partition(".")[0]
    assert (tmp_path / "export" / f"{module}.py").is_file()
    card = (tmp_path / "export" / "README.md").read_text()
    assert "library_name: transformers\n" in card
    assert "trust_remote_code=True" in card
    assert "import nemo_bard" not in card
    export(tmp_path / "export", tmp_path / "plain")
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_the_card_of_a_folder_that_no_run_made_is_kept(start, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(start, folder)
    (folder / "README.md").write_text("---\nbase_model: a/b\n---\nMine.\n")
    export(folder, tmp_path / "export")
    assert (tmp_path / "export" / "README.md").read_text().endswith("Mine.\n")


# ------------------ what is refused ------------------
def damage_config(folder, **changes):
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.unlink()
    file.write_text(json.dumps(config))


def truncate(file):
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:-7])


def lose_a_tensor(folder):
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    del weights["model.language_model.norm.weight"]
    file.unlink()
    save_file(weights, file)


def quantize(file):
    weights = load_file(file)
    file.unlink()
    save_file({**weights, "model.language_model.norm.weight": torch.ones(8, dtype=torch.int8)}, file)


DAMAGES = {
    "wrong architecture": (
        lambda folder: damage_config(folder, model_type="llama"),
        r"config.json: model_type is 'llama', allowed is bard_vl",
    ),
    "autoregressive": (
        lambda folder: damage_config(folder, model_type="qwen3_vl"),
        r"config.json: is an autoregressive Qwen3-VL, which needs no export; `nemo-bard convert` makes",
    ),
    "truncated": (
        lambda folder: truncate(next(folder.glob("*.safetensors"))),
        r"model.safetensors: has \d+ bytes, its header promises \d+; copy it again",
    ),
    "no weights": (
        lambda folder: next(folder.glob("*.safetensors")).unlink(),
        r"has neither model.safetensors nor model.safetensors.index.json",
    ),
    "a tensor less": (lose_a_tensor, r"model.language_model.norm.weight is missing; a shard is missing"),
    "another shape": (
        lambda folder: damage_config(
            folder, text_config={**json.loads((folder / "config.json").read_text())["text_config"], "vocab_size": 640}
        ),
        r"embed_tokens.weight has the shape \(576, \d+\), config.json asks for \(640, \d+\)",
    ),
    "whole numbers": (
        lambda folder: quantize(next(folder.glob("*.safetensors"))),
        r"model.language_model.norm.weight is I8, allowed are F64, F32, BF16, F16; quantized",
    ),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer_config.json").unlink(),
        r"has no tokenizer \(tokenizer_config.json\)",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line(start, tmp_path, capsys, name):
    damage, message = DAMAGES[name]
    shutil.copytree(start, tmp_path / "model", copy_function=os.link)
    damage(tmp_path / "model")
    refused(tmp_path, capsys, message, tmp_path / "model")


def refused(tmp_path, capsys, message, *words, target="export"):
    """The command ends with one line and leaves nothing."""
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert main(["export", *map(str, words[:1]), str(tmp_path / target), *map(str, words[1:])]) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert sorted(tmp_path.iterdir()) == before


def test_arguments_are_checked_first(run, start, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").touch()
    (tmp_path / "empty").mkdir()
    for words, message in {
        (tmp_path / "gone",): "gone: no such folder; SRC must be a chain's run folder",
        (tmp_path / "empty",): "empty: holds no checkpoint; SRC must be",
        (
            run,
            "--stage",
            "secnd",
        ): r"--stage must be one of first, second, third, fourth, got 'secnd' \(did you mean 'second'",
        (start, "--stage", "first"): "--stage first: .* is no run folder of a chain",
        (run, "--stage", "third"): r"stage third of \S+ is not finished; to export what it has .* \S+epoch_0_step_19$",
        (run, "--stage", "fourth"): "stage fourth of .* has not begun",
        (start, "--dtype", "int8"): "--dtype must be one of auto, float32, bfloat16, float16, got 'int8'",
        (start, "--stag"): "argument --stage: expected one argument",
        (start, "--max-shard-size", "big"): "--max-shard-size must be a number > 0 with KB, MB, GB or TB, .* got 'big'",
        (start, "--max-shard-size", "0GB"): "--max-shard-size must be a number > 0",
        (start, "--max-shard-size=-1GB"): "--max-shard-size must be a number > 0",
    }.items():
        refused(tmp_path, capsys, message, *words)
    refused(tmp_path, capsys, "taken: exists; give --overwrite", start, target="taken")
    refused(tmp_path, capsys, "taken: is no BARD checkpoint", start, "--overwrite", target="taken")
    shutil.copytree(start, tmp_path / "model")
    refused(tmp_path, capsys, "DST must not lie inside SRC", tmp_path / "model", target="model/inside")
    refused(tmp_path, capsys, "DST must not be SRC or a folder around it", tmp_path / "model", target="model")


def test_an_unfinished_chain_names_what_there_is(start, tmp_path, capsys):
    run = tmp_path / "run"
    write_stage(run, "only", start, content="1", finished=False)
    (run / "pipeline.json").write_text(json.dumps({"pipeline": "mine", "stages": ["only"]}))
    refused(tmp_path, capsys, r"no stage is finished; to export what it has so far, name its checkpoint \S+_19$", run)


def test_damaged_training_checkpoints(start, tmp_path, capsys):
    checkpoint = write_checkpoint(start, tmp_path / "run")
    (checkpoint / ".incomplete").touch()
    refused(tmp_path, capsys, "half-written, its save was interrupted", checkpoint)
    (checkpoint / ".incomplete").unlink()
    first, second = sorted((checkpoint / "model").glob("shard-*"))
    kept = first.read_bytes()
    first.unlink()
    refused(tmp_path, capsys, r"numbers of \S+ are there; the file of a rank is missing \(1 are there\)", checkpoint)
    first.write_bytes(kept)
    second.unlink()
    refused(tmp_path, capsys, r"a shard is missing, or config.json is of another model", checkpoint)
    first.write_bytes(kept[:-9])
    refused(tmp_path, capsys, r"shard-00001\S+: has \d+ bytes, its header promises", checkpoint)
    shutil.rmtree(checkpoint / "model")
    (checkpoint / "model").mkdir()
    refused(tmp_path, capsys, r"model: holds no model weights", checkpoint)


def test_distributed_files_are_checked(start, tmp_path, capsys):
    checkpoint = write_checkpoint(start, tmp_path / "run")
    for shard in (checkpoint / "model").glob("*.safetensors"):
        shard.unlink()
    torch.distributed.checkpoint.save(load_all(start), checkpoint_id=checkpoint / "model", no_dist=True)
    file = next((checkpoint / "model").glob("*.distcp"))
    os.truncate(file, file.stat().st_size // 2)
    refused(tmp_path, capsys, r"distcp: has \d+ bytes, needed are \d+", checkpoint)
    file.unlink()
    refused(tmp_path, capsys, "distcp: missing weight file", checkpoint)
    os.truncate(checkpoint / "model" / ".metadata", 100)
    refused(tmp_path, capsys, r"\.metadata: cannot be read", checkpoint)
    shutil.rmtree(checkpoint / "model" / ".hf_metadata")
    damaged = {"model": {"pretrained_model_name_or_path": "/gone"}}
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(damaged))
    refused(tmp_path, capsys, r"trained on /gone has no config.json here; name its folder with --base", checkpoint)
    (checkpoint / "config.yaml").write_text("model: [")
    refused(tmp_path, capsys, r"config.yaml: not a YAML file: ", checkpoint)


# ------------------ adapters ------------------
def write_adapters(start, checkpoint, module="model.language_model.layers.0.self_attn.q_proj", base=None):
    rows, columns = load_all(start)[f"{module}.weight"].shape
    folder = checkpoint / "model"
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    parts = {"A": torch.randn(2, columns, generator=generator), "B": torch.randn(rows, 2, generator=generator)}
    save_file(
        {f"base_model.model.{module}.lora_{k}.weight": v for k, v in parts.items()},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(base or start)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (checkpoint / "config.yaml").write_text(yaml.safe_dump({"model": {"block_size": 16}, "peft": {"dim": 2}}))
    return f"{module}.weight", parts


def test_adapters_are_added_as_merge_does(start, tmp_path):
    name, parts = write_adapters(start, tmp_path / "run" / "epoch_0_step_4")
    export(tmp_path / "run", tmp_path / "export", max_shard_size="400KB")
    assert main(["merge", str(tmp_path / "run" / "epoch_0_step_4"), str(tmp_path / "merged")]) == 0
    before, after, merged = load_all(start), load_all(tmp_path / "export"), load_all(tmp_path / "merged")
    assert all(after[key].equal(weight) for key, weight in merged.items())
    assert {key for key in before if not after[key].equal(before[key])} == {name}
    torch.testing.assert_close(after[name], before[name] + 2 * parts["B"] @ parts["A"])
    assert json.loads((tmp_path / "export" / "config.json").read_text())["block_size"] == 16
    assert "LoRA of rank 2" in (tmp_path / "export" / "README.md").read_text()


def test_adapters_need_their_own_base(start, tmp_path, capsys):
    checkpoint = tmp_path / "run" / "epoch_0_step_4"
    write_adapters(start, checkpoint)
    convert(make_tiny_qwen3_vl(tmp_path / "s", seed=1), tmp_path / "other")
    refused(
        tmp_path,
        capsys,
        r"was trained on \S+, --base \S+other has other weights",
        checkpoint,
        "--base",
        tmp_path / "other",
    )
    narrow = make_tiny_qwen3_vl(tmp_path / "n", text={"hidden_size": 64}, vision={"out_hidden_size": 64})
    convert(narrow, tmp_path / "narrow")
    refused(tmp_path, capsys, r"the adapter of \S+ is .*name another base", checkpoint, "--base", tmp_path / "narrow")
    write_adapters(start, tmp_path / "lost" / "epoch_0_step_4", base=tmp_path / "gone")
    refused(
        tmp_path, capsys, r"trained on \S+gone has no config.json here; name its folder with --base", tmp_path / "lost"
    )
    export(tmp_path / "lost", tmp_path / "export", base=start)


# ------------------ the disk ------------------
def test_a_full_disk_leaves_nothing(start, tmp_path, capsys, monkeypatch):
    write = writing._write_file

    def to_a_full_device(weights, names, plan, path, advance):
        path.symlink_to("/dev/full")
        write(weights, names, plan, path, advance)

    monkeypatch.setattr(writing, "_write_file", to_a_full_device)
    refused(tmp_path, capsys, r"No space left on device \(\S+model.safetensors\); make room", start)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refused(tmp_path, capsys, r"export: needs \S+ GB, its file system has 1e-06 GB left", start)


def test_what_was_there_stays_if_the_export_fails(start, tmp_path, monkeypatch):
    export(start, tmp_path / "export")
    before = {file.name: file.read_bytes() for file in (tmp_path / "export").iterdir()}

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, "_write_file", fail)
    with pytest.raises(OSError, match="No space left"):
        export(start, tmp_path / "export", dtype="bfloat16", overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "export").iterdir()} == before
    monkeypatch.undo()
    export(start, tmp_path / "export", dtype="bfloat16", overwrite=True)
    assert load_all(tmp_path / "export")["model.language_model.norm.weight"].dtype == torch.bfloat16
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_the_shapes_asked_for_are_those_of_the_model(golden_dir):
    for name in ("tiny_tied", "tiny_untied"):
        folder = golden_dir / "models" / name
        assert expected_shapes(folder) == {key: tuple(w.shape) for key, w in load_all(folder).items()}
