"""FLOPs of batches: the pairs of the mask, what torch counts, and the formula that AutoModel asks for."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nemo_bard import BardVLConfig, BardVLForConditionalGeneration
from nemo_bard.cost.count import row_tokens
from nemo_bard.cost.shapes import make_config
from nemo_bard.method.layout import PADDING, TokenIds, attention_mask, sample_layout
from nemo_bard.train.flops import batch_flops, count_pairs


def config():
    fields = make_config("tiny", image_token_id=500, vision_start_token_id=501).to_dict()
    own = {
        "video_token_id": 502,
        "vision_end_token_id": 503,
        "mask_token_id": 511,
        "eos_token_id": 504,
        "block_size": 4,
    }
    return BardVLConfig(**{k: v for k, v in fields.items() if k not in ("model_type", "architectures", *own)}, **own)


@pytest.mark.parametrize("context", ["block", "causal"])
def test_pairs_are_those_of_the_mask(context):
    """Two packed samples with row padding, and a two-turn sample."""
    generator, rows = torch.Generator().manual_seed(0), []
    for responses in ([(5, 12), (20, 31)], [(3, 4)]):
        parts = [sample_layout(responses[-1][1] + 2, responses, block_size=4) for _ in range(2)]
        ids = [
            torch.cat([getattr(part, name) for part in parts] + [torch.full((3,), PADDING)])
            for name in ("branch", "block")
        ]
        sample = torch.cat([torch.full((len(p),), i) for i, p in enumerate(parts)] + [torch.full((3,), PADDING)])
        order = torch.arange(len(sample))
        mixed = order if context == "causal" else torch.randperm(len(sample), generator=generator)
        rows.append({"sample_ids": sample[mixed], "branch_ids": ids[0][mixed], "block_ids": ids[1][mixed]})
        token = TokenIds(*(row for row in rows[-1].values()), order)
        found = count_pairs({k: v.unsqueeze(0) for k, v in rows[-1].items()}, context)
        assert found == int(attention_mask(token, token, context_attention=context).sum())
    longest = max(len(row["sample_ids"]) for row in rows)
    both = {
        key: torch.stack(
            [torch.nn.functional.pad(row[key], (0, longest - len(row[key])), value=PADDING) for row in rows]
        )
        for key in rows[0]
    }
    assert count_pairs(both, context) == sum(
        count_pairs({k: v.unsqueeze(0) for k, v in row.items()}, context) for row in rows
    )


def test_flops_of_a_batch_are_what_torch_counts():
    """Products exactly, rotary angles left out (transformers multiplies small matrices for them), pairs by the mask."""
    model = BardVLForConditionalGeneration(config())
    prompt, response, block = 30, 12, 4
    layout = sample_layout(prompt + response, [(prompt, prompt + response)], block)
    length = len(layout)
    ids = torch.full((1, length), 7)
    ids[0, 2:18] = model.config.image_token_id
    batch = {
        "sample_ids": torch.zeros(1, length, dtype=torch.long),
        "branch_ids": layout.branch.unsqueeze(0),
        "block_ids": layout.block.unsqueeze(0),
        "loss_mask": (layout.branch == 1).unsqueeze(0),
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
    }
    counter = FlopCounterMode(display=False)
    with counter:
        out = model(
            ids,
            attention_mask=torch.ones(1, 1, length, length, dtype=torch.bool),
            position_ids=torch.arange(length).expand(3, 1, length),
            pixel_values=torch.randn(64, 3 * 2 * 16 * 16),
            image_grid_thw=batch["image_grid_thw"],
            output_positions=batch["loss_mask"].flatten().nonzero().flatten(),
            use_cache=False,
        )
        forward = counter.get_total_flops()
        out.logits.sum().backward()
    expected = batch_flops(model.config, [batch])
    text, vision = model.config.text_config, model.config.vision_config
    # torch does not count PyTorch's fused attention on CPU
    unseen = expected.attention + 4 * 64**2 * vision.hidden_size * vision.depth
    assert forward == pytest.approx(expected.forward - unseen, rel=0.01)
    # pixels need no gradient: the first layer of the vision tower has only one of its two products
    pixels = 2 * 64 * vision.hidden_size * 3 * 2 * 16 * 16
    assert counter.get_total_flops() == pytest.approx(expected.model - 3 * unseen - pixels, rel=0.01)
    heads = text.num_attention_heads * text.head_dim
    assert expected.attention == 4 * text.num_hidden_layers * heads * count_pairs(batch, "block")
    assert batch_flops(model.config, [batch, batch]).forward == 2 * expected.forward


def test_automodel_finds_the_formula():
    from nemo_automodel._transformers.mfu import AutoMFU

    mfu = AutoMFU(config(), device="H100")
    prompt, response = 30, 12
    length = row_tokens(prompt, response, 4)
    one = BardVLConfig.flops_formula(config(), 1, length, prompt_tokens=prompt, image_tokens=16)
    assert one > BardVLConfig.flops_formula(config(), 1, length, prompt_tokens=prompt)
    assert BardVLConfig.flops_formula(config(), 3, length, prompt_tokens=prompt, image_tokens=16) == 3 * one
    assert mfu.flops_formula is BardVLConfig.flops_formula
    assert mfu((2, length), 1.0, world_size=1) > 0
    with pytest.raises(ValueError, match="prompt_tokens < seq_len"):
        BardVLConfig.flops_formula(config(), 1, 8, prompt_tokens=8)
