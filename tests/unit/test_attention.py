"""The strips of the backend ``bard`` on CPU against PyTorch's attention over the whole dense mask."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from nemo_bard.method.layout import sample_layout
from nemo_bard.model import attention
from nemo_bard.model.attention import STRIP_KEYS, STRIP_QUERIES, bard_attention
from nemo_bard.train.masks import dense_mask

HEADS, GROUPS, SIZE = 4, 2, 16


def packed_row(sizes: list[tuple[int, int]], block_size: int = 8, padding: int = 0) -> dict[str, torch.Tensor]:
    """Ids of one row: samples of (prompt, response) tokens, and padding."""
    rows: dict[str, list[torch.Tensor]] = {"sample_ids": [], "branch_ids": [], "block_ids": []}
    for number, (prompt, response) in enumerate(sizes):
        layout = sample_layout(prompt + response, [(prompt, prompt + response)], block_size)
        rows["sample_ids"].append(torch.full((len(layout),), number))
        rows["branch_ids"].append(layout.branch)
        rows["block_ids"].append(layout.block)
    fills = {"sample_ids": -1, "branch_ids": 0, "block_ids": 0}
    batch = {
        name: torch.cat([*parts, torch.full((padding,), fills[name])]).unsqueeze(0).long()
        for name, parts in rows.items()
    }
    return {**batch, "input_ids": torch.zeros_like(batch["sample_ids"])}


def random_inputs(rows: int, length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys and values as the layers make them: ``[N, L, H, D]``, transposed."""
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, HEADS // GROUPS, HEADS // GROUPS)
    return [
        torch.randn(rows, length, n, SIZE, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for n in heads
    ]


def both(mask: torch.Tensor, inputs: list[torch.Tensor], scaling: float | None) -> tuple[list, list]:
    """Output and gradients over the whole mask, and in strips."""
    plain = scaled_dot_product_attention(*inputs, attn_mask=mask, scale=scaling, enable_gqa=True).transpose(1, 2)
    factor = torch.arange(plain.numel()).view(plain.shape).cos().to(plain.dtype)
    expected = [plain, *torch.autograd.grad((plain * factor).sum(), inputs)]
    strips, _ = bard_attention(torch.nn.Module(), *inputs, mask, scaling=scaling)
    assert "StripAttention" in "".join(
        type(node).__name__ for node, _ in strips.grad_fn.next_functions + ((strips.grad_fn, 0),)
    )
    return expected, [strips, *torch.autograd.grad((strips * factor).sum(), inputs)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("context_attention", ["block", "causal"])
@pytest.mark.parametrize("sizes", [[(300, 200)], [(90, 40), (10, 3), (200, 61)], [(70, 45)] * 6])
def test_strips_equal_the_whole_mask(sizes, context_attention, dtype):
    batch = packed_row(sizes, padding=37)
    mask = dense_mask(batch, context_attention)
    expected, found = both(mask, random_inputs(1, mask.shape[-1], dtype), 0.3)
    # sums in another order: 1e-5 in float32; 8 bits of mantissa in bfloat16
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    for a, b in zip(expected, found, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance * float(a.abs().max()))


def test_rows_of_a_batch_share_strips_and_keep_their_masks():
    one, two = packed_row([(200, 100)], padding=0), packed_row([(40, 20), (100, 50), (30, 20)], padding=0)
    length = max(one["input_ids"].shape[1], two["input_ids"].shape[1])
    masks = torch.eye(length, dtype=torch.bool).repeat(2, 1, 1, 1)
    for row, batch in enumerate((one, two)):
        mask = dense_mask(batch, "block")
        masks[row, 0, : mask.shape[-1], : mask.shape[-1]] = mask[0, 0]
    expected, found = both(masks, random_inputs(2, length, torch.float32), None)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5 * float(a.abs().max()))


def test_what_nobody_sees_is_left_out_and_strips_are_cut_once():
    mask = dense_mask(packed_row([(120, 80)] * 8), "block")
    length = mask.shape[-1]
    strips = attention._strips(mask, torch.float32)
    assert [row for strip in strips for row in range(length)[strip.queries]] == list(range(length))
    assert sum(strip.mask.numel() for strip in strips) < 0.3 * length**2
    for strip in strips:
        columns = torch.cat([torch.arange(length)[part] for part in strip.keys])
        assert torch.equal(strip.mask[0, 0] == 0, mask[0, 0, strip.queries][:, columns])
        left_out = torch.ones(length, dtype=torch.bool).index_fill(0, columns, False)
        assert not mask[0, 0, strip.queries][:, left_out].any()
    assert attention._strips(mask, torch.float32) is strips


def test_queries_without_keys_give_zeros():
    length = STRIP_QUERIES + STRIP_KEYS + 3
    mask = torch.zeros(1, 1, length, length, dtype=torch.bool)
    mask[..., :5, :5] = True
    inputs = random_inputs(1, length, torch.float32)
    found, _ = bard_attention(torch.nn.Module(), *inputs, mask)
    grads = torch.autograd.grad(found.sum(), inputs)
    assert torch.equal(found[:, 5:], torch.zeros_like(found[:, 5:]))
    assert all(grad.isfinite().all() for grad in grads)


def test_autocast_computes_in_its_dtype():
    mask = dense_mask(packed_row([(300, 200)]), "block")
    inputs = random_inputs(1, mask.shape[-1], torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = both(mask, inputs, None)
    assert found[0].dtype == expected[0].dtype == torch.bfloat16
    for a, b in zip(expected, found, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(b, a, rtol=2e-2, atol=2e-2 * float(a.abs().max()))
