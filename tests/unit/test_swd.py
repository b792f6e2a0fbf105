"""Distillation without a run: the anchor's view of a row, its noise, its loss, and what a recipe may say."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from nemo_bard.base.paths import recipes_dir
from nemo_bard.method.layout import NOISY, PADDING, RowOptions, TokenIds, attention_mask, sample_layout
from nemo_bard.method.losses import DistillationLoss
from nemo_bard.method.schedule import NoiseSettings
from nemo_bard.train.config import validate_recipe

LENGTH, RESPONSES = 61, [(5, 8), (12, 31), (40, 56)]  # of 3, 19 and 16 tokens


def ids_of(layout, block):
    return TokenIds(torch.zeros_like(block), layout.branch, block, torch.arange(len(layout)))


def visible(layout, block, supervised, context_attention="block"):
    """What each noisy token sees: ``{(response, index): {("context", place) or ("noisy", response, index)}}``."""
    ids = ids_of(layout, block)
    mask = attention_mask(ids, ids, context_attention=context_attention)
    names, seen = [], dict.fromkeys(supervised, 0)
    for place in range(len(layout)):
        response = int(layout.response[place])
        names.append(("context", place) if response < 0 else ("noisy", response, seen[response]))
        if response >= 0:
            seen[response] += 1
    return {
        names[query][1:]: {names[key] for key in mask[query].nonzero().flatten().tolist()}
        for query in range(len(layout))
        if names[query][0] == "noisy"
    }


@pytest.mark.parametrize("context_attention", ["block", "causal"])
@pytest.mark.parametrize("supervised", [[0, 1, 2], [1], [2]])
@pytest.mark.parametrize(("student", "anchor"), [(8, 4), (16, 4), (32, 1), (8, 8)])
def test_both_models_see_in_one_row_what_each_sees_in_its_own(student, anchor, supervised, context_attention):
    shared = sample_layout(
        LENGTH, RESPONSES, student, supervised=supervised, options=RowOptions(anchor_block_size=anchor)
    )
    own = sample_layout(LENGTH, RESPONSES, student, supervised=supervised)
    teacher = sample_layout(LENGTH, RESPONSES, anchor, supervised=supervised)
    assert own.anchor_block is None
    args = (supervised, context_attention)
    assert visible(shared, shared.block, *args) == visible(own, own.block, *args)
    expected = visible(teacher, teacher.block, *args)
    found = visible(shared, shared.anchor_block, *args)
    assert expected.keys() <= found.keys()
    assert {token: found[token] for token in expected} == expected
    # what has no place in the anchor's own row is marked, and sees and disturbs nobody
    taught = (shared.anchor_block != PADDING) & (shared.branch == NOISY)
    assert int(taught.sum()) == len(expected)
    assert shared.padding[(shared.branch == NOISY) & ~taught].all()


def test_row_grows_by_less_than_a_block():
    shared = sample_layout(LENGTH, RESPONSES, 16, options=RowOptions(anchor_block_size=4))
    own = sample_layout(LENGTH, RESPONSES, 16)
    assert len(shared) - len(own) == 12  # clean tokens 0 to 11 of the last response's only block


@pytest.mark.parametrize(("student", "anchor"), [(4, 8), (8, 3), (8, 0), (8, True)])
def test_block_sizes_that_do_not_fit(student, anchor):
    with pytest.raises(ValueError, match=r"block.size must be"):
        sample_layout(LENGTH, RESPONSES, student, options=RowOptions(anchor_block_size=anchor))


class TestLoss:
    def inputs(self):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(6, 11, generator=generator, dtype=torch.float64)
        anchor = torch.randn(6, 11, generator=generator, dtype=torch.float64)
        return logits, anchor, torch.randint(11, (6,), generator=generator)

    def call(self, loss, logits, anchor, labels, kd_mask=None):
        top = anchor.topk(loss.kd_top_k)
        return loss(
            logits,
            labels,
            weight=torch.full((6,), 1 / 6, dtype=torch.float64),
            anchor_top_logits=top.values,
            anchor_top_ids=top.indices,
            kd_mask=torch.ones(6, dtype=torch.bool) if kd_mask is None else kd_mask,
        )

    def test_is_the_weighted_sum_of_two_means(self):
        logits, anchor, labels = self.inputs()
        out = self.call(DistillationLoss(ce_weight=2.0, kd_weight=0.25, kd_top_k=11), logits, anchor, labels)
        assert out.ce.item() == pytest.approx(F.cross_entropy(logits, labels).item())
        kd = -(anchor.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
        assert out.kd.item() == pytest.approx(kd.item())
        assert out.loss.item() == pytest.approx(2 * out.ce.item() + 0.25 * out.kd.item())

    def test_kd_counts_only_where_the_anchor_teaches(self):
        logits, anchor, labels = self.inputs()
        loss = DistillationLoss(kd_top_k=4)
        each = [self.call(loss, logits, anchor, labels, torch.arange(6) == i).kd.item() for i in range(6)]
        some = self.call(loss, logits, anchor, labels, torch.tensor([True, False, True, True, False, False])).kd.item()
        assert some == pytest.approx(each[0] + each[2] + each[3])
        assert sum(each) == pytest.approx(self.call(loss, logits, anchor, labels).kd.item())

    @pytest.mark.parametrize("temperature", [1.0, 3.0])
    def test_a_student_like_its_anchor_has_nothing_to_learn(self, temperature):
        logits, _, labels = self.inputs()
        logits.requires_grad_()
        settings = {"ce_weight": 0.0, "kd_weight": 1.0, "kd_temperature": temperature}
        reverse = self.call(
            DistillationLoss(kd_direction="reverse", kd_top_k=5, **settings), logits, logits.detach(), labels
        )
        assert reverse.loss.item() == 0.0
        forward = self.call(DistillationLoss(kd_top_k=11, **settings), logits, logits.detach(), labels)
        p = (logits / temperature).softmax(-1)
        entropy = -(p * p.log()).sum(-1).mean()
        assert forward.loss.item() == pytest.approx(entropy.item())
        for value in (reverse.loss, forward.loss):
            (gradient,) = torch.autograd.grad(value, logits)
            assert gradient.abs().max() < 1e-15

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"kd_top_k": 0}, "kd_top_k must be an integer >= 1, got 0"),
            ({"kd_top_k": 1.5}, "kd_top_k must be an integer >= 1, got 1.5"),
            ({"kd_temperature": 0}, "kd_temperature must be > 0, got 0"),
            ({"kd_temperature": "x"}, "kd_temperature must be a number >= 0, got 'x'"),
            ({"kd_direction": "both"}, "kd_direction must be one of forward, reverse, got 'both'"),
            ({"kd_weight": -1}, "kd_weight must be a number >= 0, got -1"),
            ({"ce_weight": math.nan}, "ce_weight must be a number >= 0, got nan"),
            ({"ce_weight": 0, "kd_weight": 0}, "must not both be 0"),
        ],
    )
    def test_bad_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            DistillationLoss(**settings)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """``student`` (block size 8) and anchors that fit or do not."""
    from nemo_bard.checkpoints.convert import convert
    from nemo_bard.checkpoints.tiny import make_tiny_qwen3_vl

    root = tmp_path_factory.mktemp("swd")
    convert(make_tiny_qwen3_vl(root / "source"), root / "student", block_size=8)
    convert(root / "source", root / "anchor", block_size=4)
    convert(root / "source", root / "large_blocks", block_size=16)
    wide = make_tiny_qwen3_vl(root / "wide_source", spare_tokens=200)
    convert(
        wide,
        root / "wide",
        block_size=4,
        mask_token_id=json.loads((root / "student/config.json").read_text())["mask_token_id"],
    )
    shutil.copytree(root / "anchor", root / "other_tokens")
    tokenizer = (root / "other_tokens" / "tokenizer.json").read_text()
    assert '"<tool_call>"' in tokenizer
    (root / "other_tokens" / "tokenizer.json").write_text(tokenizer.replace('"<tool_call>"', '"<renamed>"'))
    shutil.copytree(root / "anchor", root / "no_tokenizer")
    for file in (root / "no_tokenizer").glob("*token*"):
        file.unlink()
    return root


@pytest.fixture
def raw(folders, tmp_path):
    """``recipes/swd.yaml`` with checkpoint folders and a data set."""
    recipe = yaml.safe_load((recipes_dir() / "swd.yaml").read_text())
    recipe["model"]["pretrained_model_name_or_path"] = str(folders / "student")
    recipe["anchor"]["pretrained_model_name_or_path"] = str(folders / "anchor")
    (tmp_path / "train.jsonl").write_text("{}\n")
    recipe["dataset"]["path"] = str(tmp_path / "train.jsonl")
    return recipe


def validate(raw, changes=()):
    from nemo_bard.train.swd import SWDRecipe

    for dotted, value in changes:
        *parents, leaf = dotted.split(".")
        node = raw
        for name in parents:
            node = node[name]
        node[leaf] = value
    SWDRecipe.validate_config(raw)


def test_shipped_recipe_is_accepted(raw):
    validate(raw)
    with pytest.raises(ValueError, match="unknown recipe key anchor"):
        validate_recipe(raw)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("anchor.pretrained_model_name_or_path", None, "anchor.pretrained_model_name_or_path must name a checkpoint"),
        ("anchor.pretrained_model_name_or_path", "/no/such", "anchor.pretrained_model_name_or_path: /no/such is not"),
        ("anchor.pretrained_model_name_or_path", "FOLDERS/source", "is a Qwen3-VL checkpoint"),
        (
            "anchor.pretrained_model_name_or_path",
            "FOLDERS/large_blocks",
            "at most the student's 8 and divide it, got 16",
        ),
        ("anchor.pretrained_model_name_or_path", "FOLDERS/wide", "its vocab_size is .*, the student's is .*equal"),
        (
            "anchor.pretrained_model_name_or_path",
            "FOLDERS/other_tokens",
            r"differs .* in 2 tokens, such as '<renamed>'",
        ),
        ("anchor.pretrained_model_name_or_path", "FOLDERS/no_tokenizer", "no_tokenizer has no tokenizer"),
        ("anchor.block_size", 3, "at most the student's 8 and divide it, got 3"),
        ("anchor.block_size", 0, "anchor.block_size must be an integer >= 1, got 0"),
        ("anchor.block_sise", 4, "unknown recipe key anchor.block_sise; did you mean anchor.block_size?"),
        ("anchor.mask_token_id", 1, "its mask_token_id is 1, the student's is"),
        (
            "anchor.attn_implementation",
            "eager",
            "anchor.attn_implementation must be one of auto, sdpa, bard, got 'eager'",
        ),
        ("anchor", None, "the recipe needs a section 'anchor'"),
        ("model.block_size", 2, "at most the student's 2 and divide it, got 4"),
        ("offload_anchor", "yes", "offload_anchor must be true or false, got 'yes'"),
        ("loss_fn.kd_top_k", 0, "loss_fn.kd_top_k must be an integer >= 1, got 0"),
        ("loss_fn.kd_top_k", 10**6, "loss_fn.kd_top_k must be at most the vocabulary's"),
        ("loss_fn.kd_direction", "revers", "loss_fn.kd_direction must be one of forward, reverse"),
        ("loss_fn.kd_temperature", 0, "loss_fn.kd_temperature must be > 0, got 0"),
        ("loss_fn.kd_topk", 4, "did you mean loss_fn.kd_top_k?"),
        (
            "loss_fn",
            {"_target_": "nemo_bard.method.MixturePathKL"},
            "must be nemo_bard.method.DistillationLoss|does not go with noise",
        ),
        (
            "loss_fn",
            {"_target_": "nemo_bard.method.BlockDiffusionCrossEntropy"},
            "must be nemo_bard.method.Distill",
        ),
        ("noise.min_masked", -1, "noise.min_masked must be an integer >= 0, got -1"),
        (
            "noise.per",
            "block",
            "noise.min_masked=1 needs noise.name: mask and noise.per: sample, got 'mask' and 'block'",
        ),
        ("lr_scheduler.lr_warmup_steps", 2000, "lr_warmup_steps=2000 must be less than step_scheduler.max_steps=2000"),
        ("optimizer.lr", 1e-6, "lr_scheduler.min_lr=3e-06 must be at most optimizer.lr=1e-06"),
    ],
)
def test_bad_input_is_one_line(raw, folders, key, value, message):
    if isinstance(value, str):
        value = value.replace("FOLDERS", str(folders))
    with pytest.raises(ValueError, match=message) as error:
        validate(raw, [(key, value)])
    assert "\n" not in str(error.value)


class TestAnchorInBatches:
    @pytest.fixture(scope="class")
    def batch(self, folders):
        from transformers import AutoProcessor

        from nemo_bard import BardVLConfig
        from nemo_bard.data.collate import BlockDiffusionCollator

        def talk(*answers):
            turns = [({"role": "user", "content": f"ask {a}"}, {"role": "assistant", "content": a}) for a in answers]
            return [message for turn in turns for message in turn]

        processor = AutoProcessor.from_pretrained(folders / "student")
        config = BardVLConfig.from_pretrained(folders / "student")
        make = BlockDiffusionCollator(processor, config, options=RowOptions(anchor_block_size=4))
        answers = [("1",), ("1 2 3 4 5 6 7 8 9 10",), ("12", "a b c")]
        examples = [{"conversation": talk(*a), "sample_index": i} for i, a in enumerate(answers)]
        return make(examples), BlockDiffusionCollator(processor, config)(examples), config

    def test_anchor_block_ids(self, batch):
        with_anchor, without, _ = batch
        assert "anchor_block_ids" not in without
        anchor, blocks = with_anchor["anchor_block_ids"], with_anchor["block_ids"]
        assert anchor.shape == blocks.shape
        noisy = (with_anchor["branch_ids"] == NOISY) & (with_anchor["sample_ids"] != PADDING)
        untaught = noisy & (anchor == PADDING)
        assert int(untaught.sum()) > 0
        assert with_anchor["padding_mask"][untaught].all()
        for response in range(int(with_anchor["response_ids"].max()) + 1):
            places = (with_anchor["response_ids"] == response) & ~untaught
            inside = anchor[places]
            assert torch.equal(inside - inside[0], torch.arange(len(inside)) // 4)
            text = places & ~with_anchor["padding_mask"]
            assert -(-int(text.sum()) // 4) * 4 == len(inside)

    def test_at_least_one_token_is_masked(self, batch):
        from nemo_bard.method.corruption import NoiseContext, corrupt_batch

        clean, _, config = batch
        for minimum, level in ((1, 1e-6), (3, 1e-6), (10**6, 0.5), (1, 1.0)):
            settings = NoiseSettings(low=level, high=level, per="sample", min_masked=minimum)
            without = NoiseSettings(low=level, high=level, per="sample")
            for epoch in range(3):
                context = NoiseContext(
                    block_size=8, mask_token_id=config.mask_token_id, num_random_ids=100, seed=0, epoch=epoch
                )
                noised, plain = corrupt_batch(clean, settings, context), corrupt_batch(clean, without, context)
                noisy = clean["response_ids"] >= 0
                wanted = torch.maximum(plain["loss_mask"].sum(1), noisy.sum(1).clamp_max(minimum))
                assert torch.equal(noised["loss_mask"].sum(1), wanted)
                assert (noised["loss_mask"] >= plain["loss_mask"]).all(), "only adds"
                assert torch.equal(noised["loss_mask"], (noised["input_ids"] == config.mask_token_id) & noisy)
                assert torch.equal(noised["labels"] >= 0, noised["loss_mask"])
                assert torch.equal(noised["input_ids"], corrupt_batch(clean, settings, context)["input_ids"])
