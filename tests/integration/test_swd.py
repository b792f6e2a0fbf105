"""The SWD recipe for real: one and two ranks, interrupted and resumed, anchors of other sizes, chunks."""

import json
import math

import pytest
from safetensors import safe_open
from test_pbm import drive, read_log, write_data

pytestmark = pytest.mark.slow

STEPS = 6
TRAIN = {
    "step_scheduler.global_batch_size": 4,
    "step_scheduler.local_batch_size": 2,
    "step_scheduler.max_steps": STEPS,
    "step_scheduler.ckpt_every_steps": 100,
    "step_scheduler.val_every_steps": 3,
    "dataloader.collate_fn.pad_to_multiple_of": 1,
    "lr_scheduler.lr_warmup_steps": 1,
    "optimizer.lr": 1e-3,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All jobs on the same mixed data: the student has tied weights, the anchor others, of another size."""
    from nemo_bard.checkpoints.convert import convert
    from nemo_bard.checkpoints.tiny import make_tiny_qwen3_vl

    folder = tmp_path_factory.mktemp("swd")
    data = write_data(folder / "data", 11)
    make_tiny_qwen3_vl(folder / "source")
    text = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
    vision = {"out_hidden_size": 48}
    make_tiny_qwen3_vl(folder / "other_source", seed=1, text=text, vision=vision, tie_word_embeddings=False)
    convert(folder / "source", folder / "student", block_size=8)
    convert(folder / "other_source", folder / "anchor", block_size=4)
    convert(folder / "other_source", folder / "untied_student", block_size=8)
    convert(folder / "source", folder / "tied_anchor", block_size=2)
    vocabulary = json.loads((folder / "student" / "config.json").read_text())["text_config"]["vocab_size"]

    def job(name, *, student="student", anchor="anchor", **changes):
        where = {
            "model.pretrained_model_name_or_path": str(folder / student),
            "anchor.pretrained_model_name_or_path": str(folder / anchor),
            "dataset.path": str(data),
            "validation_dataset": {"_target_": "nemo_bard.data.JsonlDataset", "path": str(data)},
            "checkpoint.checkpoint_dir": str(folder / name),
        }
        return {"recipe": "swd", "overrides": {**TRAIN, **where, **changes}}

    joint = {
        "model.context_attention": "causal",
        "ar_loss_weight": 0.5,
        "noise.complementary": True,
        "noise.min_masked": 0,
        "noise.high": 0.9,
        "step_scheduler.max_steps": 3,
    }
    alike = {"anchor": "student", "loss_fn.ce_weight": 0.0, "loss_fn.kd_weight": 1.0, "step_scheduler.max_steps": 2}
    swapped = {
        "student": "untied_student",
        "anchor": "tied_anchor",
        "loss_fn.kd_direction": "reverse",
        "loss_fn.kd_temperature": 2.0,
        "step_scheduler.max_steps": 3,
    }
    drive(
        [
            job("one"),
            {**job("cut"), "sigterm_at": 4},
            job("cut"),
            job("split", **{"step_scheduler.local_batch_size": 4, "loss_chunk_tokens": 3}),
            job("swapped", **swapped),
            job("joint", **joint),
            job("alike_reverse", **alike, **{"loss_fn.kd_direction": "reverse"}),
            job("alike_forward", **alike, **{"loss_fn.kd_top_k": vocabulary}),
        ],
        folder,
    )
    drive([job("two"), job("swapped_two", **swapped), job("joint_two", **joint)], folder, ranks=2)
    return folder


@pytest.mark.parametrize(
    ("first", "second", "steps"),
    [("one", "two", STEPS), ("swapped", "swapped_two", 3), ("one", "split", STEPS), ("joint", "joint_two", 3)],
)
def test_ranks_microbatches_and_chunks_change_nothing(runs, first, second, steps):
    a, b = read_log(runs / first), read_log(runs / second)
    assert len(a) == len(b) == steps
    for ours, theirs in zip(a, b, strict=True):
        for key in ("loss", "ce_loss", "kd_loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (ours["step"], key)
        assert ours["num_loss_tokens"] == theirs["num_loss_tokens"]


def test_loss_is_the_sum_of_its_parts(runs):
    for line in read_log(runs / "one"):
        assert line["loss"] == pytest.approx(line["ce_loss"] + 0.5 * line["kd_loss"], rel=1e-5)
        assert line["num_loss_tokens"] > 0
    losses = [line["loss"] for line in read_log(runs / "one")]
    assert losses[-1] < losses[0]


def test_interrupted_run_goes_on_with_the_losses_of_the_uninterrupted_one(runs):
    whole, cut = read_log(runs / "one"), read_log(runs / "cut")
    assert [line["step"] for line in cut] == list(range(STEPS))
    for a, b in zip(whole, cut, strict=True):
        for key in ("loss", "ce_loss", "kd_loss", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-6), (a["step"], key)


def test_validation_is_the_same_on_two_ranks(runs):
    first, second = read_log(runs / "one", "validation"), read_log(runs / "two", "validation")
    assert len(first) == len(second) == 2
    for a, b in zip(first, second, strict=True):
        for key in ("val_loss", "val_ce_loss", "val_kd_loss"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key
        assert a["val_loss"] == pytest.approx(a["val_ce_loss"] + 0.5 * a["val_kd_loss"], rel=1e-5)
        assert a["num_samples"] == b["num_samples"] == 11


def test_a_student_like_its_anchor_has_nothing_to_learn(runs):
    """Same weights and block size: reverse KL is 0, and forward KL over the whole vocabulary is the entropy."""
    reverse, forward = (read_log(runs / name)[0] for name in ("alike_reverse", "alike_forward"))
    assert reverse["loss"] == reverse["kd_loss"] == 0.0
    assert reverse["grad_norm"] < 1e-5
    assert forward["kd_loss"] > 1.0
    assert forward["grad_norm"] < 1e-5


def test_checkpoint_holds_the_student_only(runs):
    folder = runs / "one" / "LATEST" / "model" / "consolidated"
    with safe_open(runs / "student" / "model.safetensors", "pt") as file:
        source = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert found == source
    assert json.loads((folder / "config.json").read_text())["block_size"] == 8


def test_every_logged_number_is_finite(runs):
    for name in ("one", "swapped", "joint", "alike_reverse", "alike_forward"):
        for line in read_log(runs / name):
            assert all(math.isfinite(value) for value in line.values() if isinstance(value, float)), line


def test_joint_run_adds_the_three_parts(runs):
    """Distillation and the autoregressive loss, on noise and its complement."""
    lines = read_log(runs / "joint")
    for line in lines:
        assert line["diffusion_loss"] == pytest.approx(line["ce_loss"] + 0.5 * line["kd_loss"], rel=1e-4)
        assert line["loss"] == pytest.approx(line["diffusion_loss"] + 0.5 * line["ar_loss"], rel=1e-4)
        assert line["num_loss_tokens"] % 8 == 0, "every token of every block once"
    (validation,) = read_log(runs / "joint", "validation")
    parts = validation["val_ce_loss"] + 0.5 * validation["val_kd_loss"] + 0.5 * validation["val_ar_loss"]
    assert validation["val_loss"] == pytest.approx(parts, rel=1e-4)
