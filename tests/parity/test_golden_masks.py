"""The attention mask against the reference's, which differs in one cell only: clean queries and noisy keys."""

from __future__ import annotations

import pytest
import torch
from golden_data import golden_arrays, golden_cases

from nemo_bard.method.layout import CONTEXT, NOISY, PADDING, TokenIds, attention_mask, context_block_ids, sample_layout

CASES = golden_cases("attention_mask")


@pytest.fixture(scope="module")
def masks():
    return golden_arrays("attention_mask", "masks.npz")


def reference_row(prefix: int, response: int, block_size: int, width: int) -> TokenIds:
    """``[prefix | clean | noisy]`` as the reference lays it out (clean copy padded too), cut or padded to ``width``."""
    length = prefix + response
    layout = sample_layout(length, [(prefix, length)], block_size, drop_last_clean_block=False)
    assert len(layout) == length + response
    row = TokenIds(torch.zeros_like(layout.block), layout.branch, layout.block, torch.arange(len(layout)))
    tail = max(width - len(layout), 0)
    fill = TokenIds(PADDING, CONTEXT, 0, 0)
    return TokenIds(
        *(torch.nn.functional.pad(ids, (0, tail), value=value)[:width] for ids, value in zip(row, fill, strict=True))
    )


@pytest.mark.parametrize("case", CASES, ids=[case["key"] for case in CASES])
def test_mask_differs_only_where_clean_queries_would_see_noisy_keys(case, masks):
    golden = masks[case["key"]]
    prefix, response = case["prefix_len"], case["response_len"]
    row = reference_row(prefix, response, case["block_size"], case["max_len"])
    ours = attention_mask(row, row)
    position = torch.arange(case["max_len"])
    real = row.sample != PADDING
    clean = real & (position >= prefix) & (position < prefix + response)
    noisy = real & (row.branch == NOISY)
    bold_cell = clean.unsqueeze(1) & noisy.unsqueeze(0)

    assert golden.shape == ours.shape
    assert int(golden.sum()) == case["n_true"]
    assert torch.equal(ours[~bold_cell], golden[~bold_cell])
    assert not ours[bold_cell].any()
    assert torch.equal(golden[bold_cell], (row.block.unsqueeze(0) <= row.block.unsqueeze(1))[bold_cell])


@pytest.mark.parametrize("case", CASES, ids=[case["key"] for case in CASES])
def test_the_causal_context_changes_nothing_for_noisy_queries(case):
    row = reference_row(case["prefix_len"], case["response_len"], case["block_size"], case["max_len"])
    noisy = row.branch == NOISY
    block, causal = (attention_mask(row, row, context_attention=name) for name in ("block", "causal"))
    assert torch.equal(block[noisy], causal[noisy])
    context = (row.branch == CONTEXT) & (row.sample != PADDING)
    tokens = int(context.sum())
    assert torch.equal(causal[context][:, context], torch.ones(tokens, tokens, dtype=torch.bool).tril())


def test_prefix_blocks_are_counted_from_the_start():
    ids = context_block_ids(10, [(6, 10)], 4)
    assert ids.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2]
