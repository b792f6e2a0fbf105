"""Masks from ids: dense, as a function for flex_attention and as a BlockMask, all against a loop over the definition."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_bard import BardVLConfig, BardVLForConditionalGeneration
from nemo_bard.cost.shapes import make_config
from nemo_bard.method.layout import CONTEXT, PADDING, sample_layout
from nemo_bard.model.attention import bard_attention
from nemo_bard.train.masks import FLEX_TILE, STRIP_TILES, block_mask, dense_mask, make_mask, mask_mod, uses_flex

CONTEXTS = ("block", "causal")


def random_rows(seed: int, rows: int = 3, samples: int = 4, tail: int = 9, prompt: int = 11) -> tuple[dict, list]:
    """Packed rows of random multi-turn samples, padded; and what each token is, for the loop.

    A token is None (padding) or (sample, response or None, offset in its region, region's first block, is noisy).
    """
    dice = random.Random(seed)
    block_size = dice.choice([1, 2, 4, 8])
    fields: dict[str, list[list[int]]] = {"sample_ids": [], "branch_ids": [], "block_ids": []}
    tokens = []
    for _ in range(rows):
        row: dict[str, list[int]] = {name: [] for name in fields}
        told: list = []
        for number in range(dice.randint(1, samples)):
            regions, cursor = [], 0  # (is response, length), a user part before each response
            for _ in range(dice.randint(1, 3)):
                regions += [(False, dice.randint(1, prompt)), (True, dice.randint(1, 13))]
            spans = []
            for is_response, length in regions:
                if is_response:
                    spans.append((cursor, cursor + length))
                cursor += length
            chosen = sorted(dice.sample(range(len(spans)), dice.randint(1, len(spans))))
            layout = sample_layout(cursor, spans, block_size, supervised=chosen)
            row["sample_ids"] += [number] * len(layout)
            row["branch_ids"] += layout.branch.tolist()
            row["block_ids"] += layout.block.tolist()
            told += describe(number, regions, chosen, block_size, len(layout))
        for name, fill in (("sample_ids", PADDING), ("branch_ids", CONTEXT), ("block_ids", 0)):
            fields[name].append(row[name] + [fill] * tail)
        tokens.append(told + [None] * tail)
    length = max(len(told) for told in tokens)
    for told in tokens:
        told += [None] * (length - len(told))
    fills = {"sample_ids": PADDING, "branch_ids": CONTEXT, "block_ids": 0}
    batch = {
        name: torch.tensor([row + [fills[name]] * (length - len(row)) for row in value])
        for name, value in fields.items()
    }
    return {**batch, "input_ids": torch.zeros_like(batch["sample_ids"])}, tokens


def describe(number: int, regions: list, chosen: list[int], block_size: int, size: int) -> list:
    """What the tokens of one sample are, counted from the regions' lengths alone."""
    context, copies, first_block, response = [], [], 0, 0
    for is_response, length in regions:
        context += [(number, "context", first_block + i // block_size) for i in range(length)]
        if is_response:
            if response in chosen:
                padded = -(-length // block_size) * block_size
                copies += [(number, "noisy", first_block + i // block_size) for i in range(padded)]
            response += 1
        first_block += -(-length // block_size)
    return context[: size - len(copies)] + copies


def allowed_by_definition(tokens: list, context_attention: str) -> torch.Tensor:
    """The method's table, pair by pair: prefix and clean are context; their blocks count through the sample."""
    length = len(tokens[0])
    out = torch.zeros(len(tokens), length, length, dtype=torch.bool)
    for row, told in enumerate(tokens):
        for q, query in enumerate(told):
            for k, key in enumerate(told):
                if query is None or key is None:
                    seen = query is None and q == k
                elif query[0] != key[0]:
                    seen = False
                elif query[1] == "context":
                    seen = key[1] == "context" and (key[2] <= query[2] if context_attention == "block" else k <= q)
                elif key[1] == "context":
                    seen = key[2] < query[2]
                else:
                    seen = key[2] == query[2]
                out[row, q, k] = seen
    return out


@pytest.mark.parametrize("context_attention", CONTEXTS)
@pytest.mark.parametrize("seed", range(6))
def test_dense_mask_and_mask_mod_are_the_definition(seed, context_attention):
    batch, tokens = random_rows(seed)
    expected = allowed_by_definition(tokens, context_attention)
    rows, length = batch["sample_ids"].shape
    assert expected.any(-1).all(), "no query without a key, padding included: no NaN"
    torch.testing.assert_close(dense_mask(batch, context_attention)[:, 0], expected)
    evaluated = create_mask(mask_mod(batch, context_attention), rows, None, length, length, device="cpu")
    torch.testing.assert_close(evaluated[:, 0], expected)


@pytest.mark.parametrize("context_attention", CONTEXTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_block_mask_is_that_of_torch_and_keeps_every_tile_that_holds_an_allowed_pair(seed, context_attention):
    batch, _ = random_rows(seed, rows=2, samples=4, tail=300, prompt=600)
    mask = block_mask(batch, context_attention)
    dense = dense_mask(batch, context_attention)
    rows, length = batch["sample_ids"].shape
    assert mask.shape == (rows, 1, length, length)
    tiles = -(-length // FLEX_TILE)
    theirs = create_block_mask(mask_mod(batch, context_attention), rows, None, length, length, device="cpu")
    for name in ("num_blocks", "indices"):
        for part in ("kv", "full_kv", "q", "full_q"):
            ours = getattr(mask, f"{part}_{name}")
            assert torch.equal(ours, getattr(theirs, f"{part}_{name}")), (part, name)
    assert mask.full_kv_num_blocks.any()
    padded = torch.zeros(rows, 1, tiles * FLEX_TILE, tiles * FLEX_TILE, dtype=torch.bool)
    padded[:, :, :length, :length] = dense
    per_tile = padded.unflatten(3, (tiles, FLEX_TILE)).unflatten(2, (tiles, FLEX_TILE)).any(5).any(3)
    torch.testing.assert_close(mask.to_dense().bool(), per_tile)
    assert per_tile.float().mean() < 0.9, "there are empty tiles to skip"


@pytest.mark.parametrize("context_attention", CONTEXTS)
def test_flex_attention_gives_the_output_of_dense_sdpa(context_attention):
    """Grouped heads, several samples in a row, padding; float32 on CPU, where flex_attention has a forward."""
    batch, _ = random_rows(3, rows=2, samples=12, tail=200)
    rows, length = batch["sample_ids"].shape
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(rows, 4, length, 32, generator=generator)
    key, value = (torch.randn(rows, 2, length, 32, generator=generator) for _ in range(2))
    layer = torch.nn.Module()
    layer.is_causal = False
    with torch.no_grad():
        flex, _ = bard_attention(layer, query, key, value, block_mask(batch, context_attention))
        dense, _ = bard_attention(layer, query, key, value, dense_mask(batch, context_attention))
        half, _ = bard_attention(
            layer, query, key, value.bfloat16(), block_mask(batch, context_attention)
        )  # as under autocast
    assert flex.isfinite().all()
    torch.testing.assert_close(flex, dense, rtol=0, atol=1e-5)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), dense, rtol=0, atol=3e-2)


def small_model(attention: str, device: str = "cpu", **options) -> BardVLForConditionalGeneration:
    source = make_config(
        "tiny", image_token_id=500, video_token_id=501, vision_start_token_id=502, vision_end_token_id=503
    )
    fields = {k: v for k, v in source.to_dict().items() if k not in ("model_type", "architectures")}
    torch.manual_seed(0)
    config = BardVLConfig(**{**fields, "mask_token_id": 510, "eos_token_id": 509}, block_size=4, **options)
    model = BardVLForConditionalGeneration(config).to(device)
    model.set_attn_implementation(attention)
    return model


def model_batch(device: str = "cpu") -> dict:
    batch, _ = random_rows(5, rows=2, samples=12, tail=40)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(400, batch["sample_ids"].shape, generator=generator)
    positions = torch.arange(ids.shape[1]).expand(3, *ids.shape)
    return {k: v.to(device) for k, v in {**batch, "input_ids": ids, "position_ids": positions}.items()}


@pytest.mark.parametrize("context_attention", CONTEXTS)
def test_the_model_gives_the_same_logits_with_either_mask(context_attention):
    model, batch = small_model("bard", context_attention=context_attention).eval(), model_batch()
    with torch.no_grad():
        results = [
            model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=mask).logits
            for mask in (block_mask(batch, context_attention), dense_mask(batch, context_attention))
        ]
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)


def test_no_pairs_of_a_whole_row_at_once():
    """The largest tensor while a mask is built is a strip of queries, not ``[L, L]``."""
    batch, _ = random_rows(0, rows=1, samples=12, tail=2048)
    length = batch["sample_ids"].shape[1]
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        block_mask(batch, "block")
    assert length < largest <= STRIP_TILES * FLEX_TILE * (length + FLEX_TILE) < length**2 / 4


def test_flex_is_for_bard_on_cuda():
    bard, sdpa = small_model("bard").config, small_model("sdpa").config
    assert uses_flex(bard, torch.device("cuda", 0))
    assert not uses_flex(bard, torch.device("cpu"))
    assert not uses_flex(sdpa, torch.device("cuda", 0))
    assert isinstance(make_mask(model_batch(), bard), torch.Tensor)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("context_attention", CONTEXTS)
def test_flex_and_dense_give_the_same_gradients_on_cuda(context_attention, checkpointing):
    """Forward and backward in float32 through the recipe's mask, also with activation checkpointing."""
    batch, results = model_batch("cuda"), {}
    real = batch["sample_ids"].flatten() != PADDING
    for attention in ("bard", "sdpa"):
        model = small_model(attention, "cuda", context_attention=context_attention).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        mask = make_mask(batch, model.config)
        assert isinstance(mask, BlockMask) == (attention == "bard")
        logits = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=mask
        ).logits.flatten(0, 1)[real]
        logits.square().mean().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results[attention] = (logits.detach(), gradients)
    (flex, ours), (dense, theirs) = results["bard"], results["sdpa"]
    # TF32 is off for sdpa's matmuls by default; flex's kernel may round products to TF32 (10 bits)
    torch.testing.assert_close(flex, dense, rtol=0, atol=5e-3 * float(dense.abs().max()))
    assert ours.keys() == theirs.keys()
    scale = max(gradient.abs().max() for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert ours[name].isfinite().all(), name
        assert (ours[name] - gradient).abs().max() <= 5e-3 * scale, name


@pytest.mark.gpu
def test_rows_of_many_lengths_stay_compiled_on_cuda():
    """More lengths than the limit of recompilations, each equal to dense."""
    model = small_model("bard", "cuda").eval()
    for tail in range(0, 128 * 12, 128):
        batch, _ = random_rows(5, rows=1, samples=6, tail=tail)
        length = batch["sample_ids"].shape[1]
        batch = {k: v.cuda() for k, v in batch.items()}
        positions = torch.arange(length, device="cuda").expand(3, 1, length)
        with torch.no_grad():
            flex, dense = (
                model(input_ids=batch["input_ids"], position_ids=positions, attention_mask=mask).logits
                for mask in (block_mask(batch, "block"), dense_mask(batch, "block"))
            )
        real = batch["sample_ids"] != PADDING
        torch.testing.assert_close(flex[real], dense[real], rtol=0, atol=5e-3 * float(dense.abs().max()))
