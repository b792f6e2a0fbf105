"""From words to a checked chain: composition, final recipes, and everything that is refused before training."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from nemo_bard.base.paths import conf_dir, recipes_dir
from nemo_bard.pipeline import checks
from nemo_bard.pipeline.compose import compose, read_words
from nemo_bard.pipeline.evaluation import merge
from nemo_bard.pipeline.job import make_job
from nemo_bard.pipeline.run import job_as_yaml

PUBLISHED = {
    "bard_2b": "Qwen/Qwen3-VL-2B-Instruct",
    "bard_b32": "Qwen/Qwen3-VL-4B-Instruct",
    "bard_8b": "Qwen/Qwen3-VL-8B-Instruct",
}


def job(name="bard_b32", *words, folder=None):
    if name != "bard_tiny" and not any(word.startswith("data") for word in words):
        words = ("data.path=train.jsonl", *words)
    extra = () if folder is None else (f"run_dir={folder}",)
    return make_job(compose(read_words(recipes_dir() / f"{name}.yaml", [*words, *extra])))


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "train.jsonl"
    messages = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "1"}]
    file.write_text(json.dumps({"messages": messages}) + "\n")
    return file


def bard_folder(path: Path, block_size: int) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "bard_vl", "block_size": block_size}))
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_chain(name):
    """Block sizes, rates, batch and lengths of the paper and its reference, as composed."""
    chain = job(name)
    assert [stage.name for stage in chain.stages] == ["start", "pbm_b4", "pbm_b8", "pbm_b16", "pbm_b32", "swd_b32"]
    assert [stage.block_size for stage in chain.stages] == [4, 4, 8, 16, 32, 32]
    assert chain.stages[0].inputs == {"init": PUBLISHED[name]}
    assert chain.stages[0].compared() == {"mask_token_id": 151671, "context_attention": "block", "block_size": 4}
    for before, stage in zip(chain.stages, chain.stages[1:], strict=False):
        recipe = stage.recipe
        assert recipe["model"]["pretrained_model_name_or_path"] == str(before.export)
        assert recipe["model"]["block_size"] == stage.block_size
        assert recipe["packing"]["max_length"] == 8192
        # rows: 256 samples of about 870 tokens are 28, and 1 to 32 GPUs divide 32
        assert recipe["step_scheduler"]["global_batch_size"] == 32
        assert recipe["distributed"] == {
            "strategy": "fsdp2",
            "dp_replicate_size": "auto",
            "activation_checkpointing": True,
        }
        assert recipe["dataloader"]["collate_fn"]["max_length"] == 8192
        assert recipe["optimizer"]["betas"] == [0.9, 0.95]
        assert recipe["optimizer"]["weight_decay"] == 0.0
        assert recipe["lr_scheduler"]["lr_decay_style"] == "cosine"
        groups = {group["pattern"]: group["lr_mult"] for group in recipe["optimizer"]["param_group_overrides"]}
        assert groups[r"visual\."] == 0.1
        assert recipe["checkpoint"]["checkpoint_dir"] == str(stage.checkpoints)
        assert recipe["checkpoint"]["max_recent_checkpoints"] == 2
        assert recipe["step_scheduler"]["preemption_signal"] == ["SIGTERM", "SIGUSR1"]
    for stage in chain.stages[1:5]:
        assert stage.recipe["optimizer"]["lr"] == 2e-5
        assert (stage.recipe["noise"]["name"], stage.recipe["noise"]["low"], stage.recipe["noise"]["high"]) == (
            "mask",
            0.001,
            1.0,
        )
    swd = chain.stages[-1].recipe
    assert swd["anchor"]["pretrained_model_name_or_path"] == str(chain.stage("pbm_b4").export)
    assert (swd["optimizer"]["lr"], swd["lr_scheduler"]["lr_warmup_steps"]) == (6e-6, 100)
    assert swd["lr_scheduler"]["min_lr"] == pytest.approx(0.5 * 6e-6)
    assert (swd["noise"]["low"], swd["noise"]["high"], swd["noise"]["per"]) == (0.1, 0.5, "sample")
    loss = swd["loss_fn"]
    assert (loss["ce_weight"], loss["kd_weight"], loss["kd_top_k"]) == (1.0, 0.5, 16)


def test_packing_in_all_stages_shares_the_measured_lengths(tmp_path):
    chain = job("bard_b32", folder=tmp_path)
    for stage in chain.stages[1:]:
        assert stage.recipe["packing"] == {"max_length": 8192, "cache_dir": str(tmp_path / "lengths")}
    one = job("bard_b32", "stage.pbm_b8.overrides.packing.max_length=4096", folder=tmp_path)
    assert one.stage("pbm_b8").recipe["packing"]["max_length"] == 4096
    assert one.stage("pbm_b4").recipe["packing"]["max_length"] == 8192


def test_a_row_per_sample_and_other_batches_are_one_word_away(tmp_path):
    words = ["overrides.packing.max_length=null", "overrides.step_scheduler.global_batch_size=256"]
    chain = job("bard_b32", *words, "stage.swd_b32.overrides.packing.max_length=4096", folder=tmp_path)
    for stage in chain.stages[1:5]:
        assert stage.recipe["packing"] == {"max_length": None, "cache_dir": None}
        assert stage.recipe["step_scheduler"]["global_batch_size"] == 256
    assert chain.stages[5].recipe["packing"]["max_length"] == 4096
    one = job("bard_8b", "stage.pbm_b8.global_batch_size=64", folder=tmp_path)
    assert one.stage("pbm_b8").recipe["step_scheduler"]["global_batch_size"] == 64


def test_the_demo_stays_a_sample_per_row():
    for stage in job("bard_tiny").stages:
        if stage.trains:
            assert not stage.recipe.get("packing", {}).get("max_length")


def test_every_shipped_file_is_used_by_a_composition():
    names = {path.relative_to(conf_dir()).as_posix() for path in conf_dir().rglob("*.yaml")}
    assert {f"pipeline/{name}.yaml" for name in (*PUBLISHED, "bard_tiny")} <= names
    assert names == {
        "config.yaml",
        "data/rows.yaml",
        *(f"pipeline/{name}.yaml" for name in (*PUBLISHED, "bard_tiny")),
        *(f"model/{name}.yaml" for name in ("tiny", "qwen3_vl_2b", "qwen3_vl_4b", "qwen3_vl_8b")),
        *(f"data/{name}.yaml" for name in ("jsonl", "digits", "mixture")),
        *(f"stage/{name}.yaml" for name in ("tiny", "source", "convert", "pbm", "swd")),
        *(path.relative_to(conf_dir()).as_posix() for path in (conf_dir() / "launch").glob("*.yaml")),
    }


def test_tiny_chain_passes_its_own_checks(tmp_path):
    chain = job("bard_tiny", folder=tmp_path / "run")
    checks.check_chain(chain)
    checks.check_world(chain, 2)
    assert [stage.kind for stage in chain.stages[:3]] == ["tiny", "recipe", "convert"]
    assert chain.stage("start").inputs == {"init": "source"}
    assert not (tmp_path / "run").exists()


def test_command_line_reaches_the_recipes():
    chain = job(
        "bard_b32",
        "data.path=train.jsonl",
        "model=qwen3_vl_8b",
        "stage.pbm_b4.max_steps=100",
        "stage.pbm_b8.overrides.noise.name=mixed",
        "--overrides.optimizer.lr=1e-5",
        "overrides.on_bad_sample=drop",
        "stage.pbm_b8.overrides.on_bad_sample={action: drop, max_ratio: 0.01}",
        "data.num_workers=2",
        "keep_last=7",
    )
    assert chain.stages[0].inputs["init"] == "Qwen/Qwen3-VL-8B-Instruct"
    b4, b8 = chain.stage("pbm_b4").recipe, chain.stage("pbm_b8").recipe
    assert (b4["step_scheduler"]["max_steps"], b8["step_scheduler"]["max_steps"]) == (100, 4000)
    assert (b4["noise"]["name"], b8["noise"]["name"]) == ("mask", "mixed")
    assert b4["optimizer"]["lr"] == b8["optimizer"]["lr"] == 1e-5
    assert (b4["on_bad_sample"], b8["on_bad_sample"]) == ("drop", {"action": "drop", "max_ratio": 0.01})
    assert b4["dataset"] == {"_target_": "nemo_bard.data.JsonlDataset", "path": "train.jsonl", "root_dir": None}
    assert "validation_dataset" not in b4
    assert b4["dataloader"]["num_workers"] == 2
    assert b4["checkpoint"]["max_recent_checkpoints"] == 7
    validated = job("bard_b32", "data.path=a", "data.validation_path=b").stage("pbm_b4").recipe
    assert validated["validation_dataset"]["path"] == "b"


def test_environment_variables_of_a_recipe_are_left_to_automodel(tmp_path):
    (tmp_path / "mine.yaml").write_text((recipes_dir() / "pbm.yaml").read_text() + "wandb: {project: '${WHO,x}'}\n")
    chain = job("bard_b32", f"stage.pbm_b4.recipe={tmp_path / 'mine.yaml'}")
    assert chain.stage("pbm_b4").recipe["wandb"] == {"project": "${WHO,x}"}
    assert "${WHO,x}" in job_as_yaml(chain)


def test_cfg_prints_the_job_and_every_final_recipe():
    chain = job()
    parts = list(yaml.safe_load_all(job_as_yaml(chain)))
    assert parts[0]["order"] == [stage.name for stage in chain.stages]
    assert parts[2:] == [stage.recipe for stage in chain.stages[1:]]


def test_own_configuration_folder(tmp_path, monkeypatch):
    """``data=my_data`` from --config-dir and from ./conf."""
    text = (conf_dir() / "data" / "jsonl.yaml").read_text().replace("path: ???", "path: mine.jsonl", 1)
    for folder in ("conf", "other"):
        (tmp_path / folder / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "my_data.yaml").write_text(text)
    (tmp_path / "other" / "data" / "their_data.yaml").write_text(text.replace("mine.jsonl", "theirs.jsonl", 1))
    monkeypatch.chdir(tmp_path)
    assert job("bard_b32", "data=my_data").stage("pbm_b4").recipe["dataset"]["path"] == "mine.jsonl"
    chain = job("bard_b32", "data=their_data", "--config-dir", "other")
    assert chain.stage("pbm_b4").recipe["dataset"]["path"] == "theirs.jsonl"
    shutil.copytree(conf_dir(), tmp_path / "conf", dirs_exist_ok=True)  # a checkout beside an installed package
    assert job("bard_b32", "data=my_data").stage("pbm_b4").recipe["dataset"]["path"] == "mine.jsonl"
    (tmp_path / "conf" / "data" / "digits.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"conf/data/digits.yaml differs from .*digits.yaml, which is read instead"):
        job("bard_b32", "data=my_data")


def test_chain_of_a_users_own_as_in_the_documentation(tmp_path, monkeypatch):
    page = (recipes_dir().parent / "docs" / "pipeline.md").read_text()
    (tmp_path / "conf" / "pipeline").mkdir(parents=True)
    (tmp_path / "conf" / "pipeline" / "my_chain.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    (tmp_path / "my_recipe.yaml").write_text((recipes_dir() / "pbm.yaml").read_text())
    (tmp_path / "mine.yaml").write_text(
        "recipe: nemo_bard.pipeline.Pipeline\npipeline: my_chain\noverrides: [data=digits]\n"
    )
    monkeypatch.chdir(tmp_path)
    chain = make_job(compose(read_words(Path("mine.yaml"), [])))
    assert (chain.name, [stage.name for stage in chain.stages]) == ("my_chain", ["start", "pbm_b4", "pbm_b8", "polish"])
    assert chain.stage("polish").recipe["model"]["block_size"] == 16
    assert chain.stage("polish").recipe["dataset"]["_target_"] == "nemo_bard.data.make_digits"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage.pbm_b4.max_stesp=1"], "did you mean stage.pbm_b4.max_steps?"),
        (["stage.pbm_b5.max_steps=1"], "did you mean stage.pbm_b"),
        (["model=qwen3_vl_8"], "model=qwen3_vl_8: unknown; did you mean qwen3_vl_8b?"),
        (["modle=tiny"], "did you mean model?"),
        (["data=jsonl"], "data.path must be set"),
        (["--cgf"], "unexpected argument '--cgf'"),
        (["stage"], "unexpected argument 'stage'"),
        (["--config-dir", "nowhere"], "nowhere is not a folder"),
        (["order=[start,pbm_b4,pbm_b4]"], "stage pbm_b4 is there twice, and would write one directory twice"),
        (["order=[start,pbm_b40]"], "no stage 'pbm_b40', did you mean pbm_b4?"),
        (["stage.pbm_b8.output=pbm_b4"], "stages pbm_b4 and pbm_b8 would write one directory"),
        (["stage.pbm_b8.output=pbm_b4/sub"], "stages pbm_b4 and pbm_b8 would write one directory"),
        (["stage.pbm_b8.output=../x"], "is not below run_dir"),
        (["keep_last=0"], "keep_last must be an integer >= 1, got 0"),
        (["stage.pbm_b4.max_steps=many"], "stage.pbm_b4.max_steps must be an integer >= 1 or null, got 'many'"),
        (["stage.pbm_b4.recipe=pmb"], "did you mean 'pbm'?"),
        (
            ["launch.mode=one_jop"],
            "launch.mode must be one of one_job, per_stage, got 'one_jop' (did you mean 'one_job'?)",
        ),
        (["overrides.checkpoint.checkpoint_dir=x"], "overrides.checkpoint.checkpoint_dir: the chain sets this key"),
        (["order=[swd_b32]", "stage.swd_b32.anchor=null"], "needs a start"),
    ],
)
def test_wrong_words_are_one_line(words, message):
    if words[0] != "data=jsonl":
        words = [*words, "data.path=x"]
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        make_job(compose(read_words(recipes_dir() / "bard_b32.yaml", words)))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage.pbm_b8.block_size=4"], "stage.pbm_b8.block_size=4 must be larger than 4, that of stage pbm_b4"),
        (["order=[start,pbm_b8,pbm_b4]"], "stage.pbm_b4.block_size=4 must be larger than 8"),
        (["stage.swd_b32.block_size=16"], "stage.swd_b32.block_size=16 must be larger than 32"),
        (["stage.swd_b32.anchor=wide"], "stage.swd_b32.anchor=wide: the anchor's block size must be at most"),
        (["stage.swd_b32.anchor=gone"], "stage.swd_b32.anchor=gone is neither an earlier stage nor a folder"),
        (["order=[start,swd_b32,pbm_b4]", "stage.pbm_b4.block_size=64"], "anchor=pbm_b4 must be an earlier stage"),
        (["stage.swd_b32.anchor=start", "stage.start.block_size=64"], "must be at most the student's 32"),
        (["model.source=gone"], "model.source=gone is neither a folder nor a Hugging Face name"),
        (["model.source=nobody/nothing"], "model.source=nobody/nothing: not in the Hugging Face cache"),
        (["stage.pbm_b4.init=gone"], "stage.pbm_b4.init=gone is neither an earlier stage nor a folder"),
    ],
)
def test_chains_that_cannot_work_are_refused_before_training(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bard_folder(tmp_path / "wide", 64)
    bard_folder(tmp_path / "source", 4)
    if not any("model.source" in word for word in words):
        words = [*words, "model.source=source"]
    chain = job("bard_b32", *words)
    with pytest.raises(ValueError, match="stage|model") as error:
        checks.check_chain(chain)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["overrides.optimizer.lrr=1"], "stage pbm_b4: unknown recipe key optimizer.lrr; did you mean optimizer.lr?"),
        (["overrides.optimiser.lr=1"], "stage pbm_b4: unknown recipe key optimiser; did you mean optimizer?"),
        (["stage.swd_b32.overrides.loss_fn.kd_topk=1"], "stage swd_b32: unknown recipe key loss_fn.kd_topk"),
        (["data.path=gone.jsonl"], "gone.jsonl does not exist"),
        (["evaluation.data=digits:tset"], "split must be one of"),
        (["data.evaluation=gone.jsonl"], "gone.jsonl"),
        (["evaluation.data=digits:test", "evaluation.scorer=exact"], "scorer must be"),
    ],
)
def test_recipes_and_data_are_checked_with_inputs_still_to_be_made(words, message, data, tmp_path):
    bard_folder(tmp_path / "source", 4)
    words = [f"model.source={tmp_path / 'source'}", *words]
    if not any("data.path" in word for word in words):
        words.append(f"data.path={data}")
    with pytest.raises(ValueError, match=r".") as error:
        checks.check_chain(job("bard_b32", *words))
    assert message in str(error.value)


def test_a_bard_folder_needs_no_conversion_and_passes(data, tmp_path):
    bard_folder(tmp_path / "source", 4)
    chain = job("bard_b32", f"model.source={tmp_path / 'source'}", f"data.path={data}")
    checks.check_chain(chain)
    checks.check_world(chain, 32)
    with pytest.raises(ValueError, match="stage pbm_b4: step_scheduler.global_batch_size=32 must be divisible"):
        checks.check_world(chain, 3)
    chain = job("bard_b32", f"model.source={tmp_path / 'source'}", "overrides.distributed.dp_replicate_size=8")
    checks.check_world(chain, 16)
    with pytest.raises(
        ValueError, match="stage pbm_b4: distributed.dp_replicate_size=8 must divide the number of ranks"
    ):
        checks.check_world(chain, 8)


def test_results_of_two_ranks_are_put_together():
    def part(indices, tokens, forwards, seconds):
        samples = [{"sample_index": i, "commit_forwards": 1, "scores": {"exact_match": float(i % 2)}} for i in indices]
        return {
            "samples": samples,
            "metric": "exact_match",
            "scores": {"exact_match": 9.0},
            "num_samples": len(samples),
            "num_tokens": tokens,
            "forwards": 1,
            "denoising_forwards": forwards,
            "seconds": seconds,
        }

    both = merge([part([0, 2, 4], 30, 10, 2.0), part([1, 3], 10, 10, 1.0)])
    assert [sample["sample_index"] for sample in both["samples"]] == [0, 1, 2, 3, 4]
    assert both["scores"] == {"exact_match": 0.4}
    assert (both["tpf"], both["tpf_with_commits"]) == (2.0, 40 / 25)
    assert both["tokens_per_second"] == pytest.approx(40 / 3)
    assert both["num_samples"] == 5
