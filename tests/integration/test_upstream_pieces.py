"""AutoModel's data sets in our recipe, ours in AutoModel's, and the combinations that would train something else."""

import json
import os

import pytest
import torch
import yaml
from test_pbm import COLOURS
from test_upstream import Lab, losses

from nemo_bard.train.beside import check_beside

pytestmark = pytest.mark.slow

DATASETS = "nemo_automodel.components.datasets.vlm.datasets"
FINETUNE = "nemo_automodel.recipes.vlm.finetune.FinetuneRecipeForVLM"
DEFAULT_COLLATE = "nemo_automodel.components.datasets.vlm.collate_fns.default_collate_fn"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    environment = dict(os.environ)
    yield Lab(tmp_path_factory.mktemp("pieces"))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """The same samples as our JSONL, a Parquet file with a picture and a text, and a meta file of AutoModel's."""
    from datasets import Dataset, Features, Image, Value
    from PIL import Image as Pillow

    folder = tmp_path_factory.mktemp("squares")
    (folder / "rdr").mkdir()
    rows, ours, shared = [], [], []
    for name, colour in COLOURS.items():
        Pillow.new("RGB", (64, 64), colour).save(folder / f"{name}.png")
        rows.append({"image": str(folder / f"{name}.png"), "text": f"all {name}"})
        turns = [("user", "<image>Describe this image."), ("assistant", f"all {name}")]
        ours.append({"messages": [{"role": r, "content": t} for r, t in turns], "images": [f"{name}.png"]})
        shared.append({**ours[-1], "images": [str(folder / f"{name}.png")]})
    features = Features({"image": Image(), "text": Value("string")})
    Dataset.from_list(rows, features=features).to_parquet(folder / "rdr" / "train.parquet")
    (folder / "medpix").mkdir()
    asked = [{"image_id": r["image"], "question": "Describe this image.", "answer": r["text"]} for r in rows]
    features = Features({"image_id": Image(), "question": Value("string"), "answer": Value("string")})
    Dataset.from_list(asked, features=features).to_parquet(folder / "medpix" / "train.parquet")
    (folder / "ours.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ours))
    (folder / "shared.jsonl").write_text("".join(json.dumps(line) + "\n" for line in shared))
    columns = {"messages": "messages", "images": "images"}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    meta = {"squares": {"file_name": "shared.jsonl", "columns": columns, "tags": tags}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="module")
def expected(lab, squares):
    return losses(lab.run("jsonl", **{"dataset.path": str(squares / "ours.jsonl")})[1])


@pytest.mark.parametrize(
    ("function", "file", "packing"),
    [
        ("make_rdr_dataset", "rdr", None),
        ("make_medpix_dataset", "medpix", None),  # of which every item is made when it is asked for
        ("make_meta_dataset", "meta.json", None),
        ("make_rdr_dataset", "rdr", 512),
    ],
)
def test_automodels_data_sets_train_as_ours_do(lab, squares, expected, function, file, packing):
    """Noise is drawn from a sample's number, which AutoModel's samples get from their place."""
    dataset = {"_target_": f"{DATASETS}.{function}", "path_or_dataset": str(squares / file)}
    changes = {"packing.max_length": packing, "step_scheduler.global_batch_size": 2} if packing else {}
    recipe, log = lab.run(f"{function}_{packing}", dataset=dataset, **changes)
    if packing is None:
        assert losses(log) == pytest.approx(expected, rel=1e-6)
    else:
        assert len(recipe.dataloader.dataset) < len(COLOURS)
        assert log[0]["num_samples"] == len(COLOURS)
    assert "dataset.content" in recipe.data_stream.identity


def test_the_text_of_a_list_is_part_of_what_a_run_goes_on_with(squares):
    from nemo_automodel.components.datasets.vlm.datasets import make_rdr_dataset

    from nemo_bard.data.numbered import NumberedSamples, numbered

    samples = make_rdr_dataset(str(squares / "rdr"))
    dataset = numbered(samples)
    assert [dataset[i]["sample_index"] for i in range(4)] == [0, 1, 2, 3]
    assert dataset.identity() == NumberedSamples(list(samples)).identity()
    assert dataset.identity() != NumberedSamples(samples[::-1]).identity()
    assert numbered([{"conversation": [], "sample_index": 7}])[0]["sample_index"] == 7


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dataloader.collate_fn": {"_target_": DEFAULT_COLLATE}}, "default_collate_fn makes rows for predicting"),
        (
            {"loss_fn": {"_target_": "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"}},
            "loss_fn of this recipe must",
        ),
        ({"dataset.pretokenize": True}, r"dataset\.pretokenize: AutoModel would make rows"),
        ({"dataset.max_length": 512}, r"dataset\.max_length: AutoModel would .* dataloader\.collate_fn\.max_length"),
        ({"dataset.packing": {"enabled": True}}, r"dataset\.packing: .* use packing\.max_length"),
        ({"dataset.shard_data": True}, r"dataset\.shard_data must be false"),
        (
            {"wandb": {"project": "bard", "nam": "a"}, "needs": "wandb"},
            r"unknown recipe key wandb\.nam; did you mean wandb\.name",
        ),
        ({"mlflow": {"tracking": "a"}}, r"unknown recipe key mlflow\.tracking; did you mean"),
    ],
)
def test_our_recipe_says_what_it_cannot_take(lab, squares, change, said):
    if needed := change.pop("needs", None):
        pytest.importorskip(needed)
    dataset = {"_target_": f"{DATASETS}.make_rdr_dataset", "path_or_dataset": str(squares / "rdr")}
    with pytest.raises(ValueError, match=said) as found:
        lab.build("refused", **{"dataset": dataset, **change})
    assert "\n" not in str(found.value)


def beside(lab, **changes):
    """A recipe of AutoModel's own with data of ours."""
    raw = yaml.safe_load(
        f"""
        recipe: {FINETUNE}
        seed: 42
        model: {{pretrained_model_name_or_path: {lab.folder / "source"}}}
        dataset: {{_target_: nemo_bard.data.JsonlDataset, path: {lab.data}}}
        loss_fn: {{_target_: nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy}}
        """
    )
    return {**raw, **changes}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"dataloader": {"collate_fn": {"_target_": DEFAULT_COLLATE}}}, None),
        (
            {"dataloader": {"collate_fn": {"_target_": "nemo_bard.data.BlockDiffusionCollator"}}},
            "dataloader.collate_fn",
        ),
        ({"loss_fn": {"_target_": "nemo_bard.method.BlockDiffusionCrossEntropy"}}, "loss_fn"),
        ({"loss_fn": {"_target_": "nemo_bard.method.DistillationLoss"}}, "loss_fn"),
        ({"noise": {"name": "mask"}}, "noise is not read by FinetuneRecipeForVLM"),
        ({"ar_loss_weight": 0.5}, "ar_loss_weight is not read"),
        ({"model": {"pretrained_model_name_or_path": "START"}}, "is a block-diffusion checkpoint"),
        ({"model": {"pretrained_model_name_or_path": "START", "context_attention": "causal"}}, None),
    ],
)
def test_automodels_recipe_takes_our_data_and_nothing_else(lab, change, said):
    from nemo_automodel.recipes.vlm.finetune import FinetuneRecipeForVLM

    if change.get("model"):
        change = {"model": {**change["model"], "pretrained_model_name_or_path": str(lab.start)}}
    raw = beside(lab, **change)
    if said is None:
        check_beside(raw, FinetuneRecipeForVLM)
        return
    with pytest.raises(ValueError, match=said) as found:
        check_beside(raw, FinetuneRecipeForVLM)
    assert "recipe: nemo_bard.train.pbm.PBMRecipe" in str(found.value)
    assert "\n" not in str(found.value)
