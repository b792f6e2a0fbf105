"""One training forward gives at every noisy block what the decoder computes there, turn by turn, block by block."""

from __future__ import annotations

import pytest
import torch
from golden_data import golden_arrays

from nemo_bard.method.layout import CONTEXT, NOISY, TokenIds, attention_mask, find_responses, sample_layout

MASK, IMAGE, HEADER, END, NEWLINE, IM_START = 509, 500, [504, 507, 508], 505, 508, 504
TOLERANCE = {"rtol": 0, "atol": 1e-4}
"""On float32 logits with a standard deviation of 4; different shapes sum in a different order."""


def turn(role: int, text: list[int]) -> list[int]:
    return [IM_START, role, NEWLINE, *text, END]


def conversation(image: bool, turns: list[tuple[int, int]]) -> torch.Tensor:
    """User and assistant turns of the given lengths (the end token of an answer not counted)."""
    g = torch.Generator().manual_seed(len(turns))
    ids: list[int] = []
    for number, (question, answer) in enumerate(turns):
        text = torch.randint(500, (question,), generator=g).tolist()
        if image and number == 0:
            text = [502, *[IMAGE] * 6, 503, *text]
        ids += [
            *turn(321, text),
            NEWLINE,
            *turn(HEADER[1], torch.randint(500, (answer,), generator=g).tolist()),
            NEWLINE,
        ]
    return torch.tensor(ids[:-1])


@pytest.fixture(scope="module")
def vision():
    arrays = golden_arrays("generate", "dynamic_b8_t0.5_image.npz")
    return {name: arrays[name] for name in ("pixel_values", "image_grid_thw")}


def load(golden_model, context_attention, block_size):
    return golden_model(
        "tiny_untied",
        context_attention=context_attention,
        block_size=block_size,
        mask_token_id=MASK,
        eos_token_id=END,
        assistant_header_ids=HEADER,
    )


def positions_of(model, context, vision):
    return model.model.get_rope_index(
        context.unsqueeze(0),
        mm_token_type_ids=(context == IMAGE).int().unsqueeze(0),
        image_grid_thw=vision.get("image_grid_thw"),
        attention_mask=torch.ones(1, len(context), dtype=torch.int64),
    )[0]


def training_forward(model, context, responses, block_size, noisy_ids, vision):
    """Logits of the noisy tokens, ``[K, V]``, and the layout; ``noisy_ids`` ``[K]``."""
    layout = sample_layout(len(context), responses, block_size)
    noisy = layout.branch == NOISY
    ends = torch.tensor([end for _, end in responses])
    source = torch.where(layout.padding, ends[layout.response.clamp_min(0)] - 1, layout.source)
    ids = context[source]
    ids[noisy] = noisy_ids
    positions = positions_of(model, context, vision)[:, :, source] + layout.offset
    row = TokenIds(torch.zeros_like(ids), layout.branch, layout.block, torch.arange(len(ids)))
    mask = attention_mask(row, row, context_attention=model.config.context_attention)
    with torch.no_grad():
        logits = model(
            input_ids=ids.unsqueeze(0),
            attention_mask=mask[None, None],
            position_ids=positions,
            output_positions=noisy.nonzero().flatten(),
            **vision,
        ).logits
    return logits, layout


def decoding_logits(model, path, context, responses, block_size, noisy_ids, vision):
    """The same logits from the decoder's engine: each turn has its own prompt, and its clean blocks are committed."""
    from nemo_bard.generation.prompt import prepare_prompt
    from nemo_bard.generation.resolve import resolve_settings
    from nemo_bard.generation.session import Session
    from nemo_bard.generation.settings import BardGenerationConfig

    cursor, found = 0, []
    for start, end in responses:
        blocks = -(-(end - start) // block_size)
        settings = resolve_settings(model, BardGenerationConfig(max_new_tokens=blocks * block_size, decode_path=path))
        prompt = prepare_prompt(
            model,
            {"input_ids": context[:start].unsqueeze(0), **vision},
            block_size=block_size,
            max_new_tokens=settings.given.max_new_tokens,
            end_ids=[END],
        )
        session = Session(model, prompt, settings)
        engine = settings.engine(session)
        positions = torch.arange(block_size)
        with torch.no_grad():
            session.encode_vision()
            for block in range(blocks):
                canvas = noisy_ids[cursor : cursor + block_size].unsqueeze(0)
                if block == 0:
                    found.append(engine.first(canvas, positions))
                    # a second look at the same block, now against the cache alone
                    torch.testing.assert_close(engine.step(canvas, positions), found[-1], **TOLERANCE)
                else:
                    clean = context[start + (block - 1) * block_size : start + block * block_size].unsqueeze(0)
                    found.append(engine.advance(clean, canvas, positions))
                cursor += block_size
    return torch.cat(found)


@pytest.mark.parametrize("path", ["fast", "graph", "plain"])
@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("context_attention", ["block", "causal"])
@pytest.mark.parametrize("block_size", [4, 8])
@pytest.mark.parametrize("noise", ["all_masked", "half_masked"])
def test_training_forward_equals_cached_decoding(
    noise, block_size, context_attention, image, path, golden_model, vision
):
    model = load(golden_model, context_attention, block_size)
    vision = vision if image else {}
    context = conversation(image, [(5, 9), (3, 4), (6, 13)])
    responses = find_responses(context, HEADER, [END])
    assert len(responses) == 3
    layout = sample_layout(len(context), responses, block_size)
    clean = context[layout.source.clamp_min(0)].masked_fill(layout.padding, END)[layout.branch == NOISY]
    noisy_ids = torch.full_like(clean, MASK)
    if noise == "half_masked":
        visible = torch.rand(clean.shape, generator=torch.Generator().manual_seed(1)) < 0.5
        noisy_ids = torch.where(visible, clean, noisy_ids)
    trained, _ = training_forward(model, context, responses, block_size, noisy_ids, vision)
    decoded = decoding_logits(model, path, context, responses, block_size, noisy_ids, vision)
    # the plain engine returns log-probabilities
    torch.testing.assert_close(decoded.log_softmax(-1), trained.log_softmax(-1), **TOLERANCE)


@pytest.mark.parametrize("context_attention", ["block", "causal"])
def test_the_restart_at_responses_matters(context_attention, golden_model):
    """Guards the test above: with blocks counted through the whole context, training and decoding would differ."""
    model = load(golden_model, context_attention, 8)
    context = conversation(False, [(5, 9), (3, 4)])
    responses = find_responses(context, HEADER, [END])
    layout = sample_layout(len(context), responses, 8)
    noisy_ids = torch.full((int((layout.branch == NOISY).sum()),), MASK)
    both, layout = training_forward(model, context, responses, 8, noisy_ids, {})
    second = layout.response[layout.branch == NOISY] == 1
    forgetful, _ = training_forward(model, context, responses[1:], 8, noisy_ids[second], {})
    differs = (both[second] - forgetful).abs().max() > 1e-2
    assert differs == (context_attention == "block")


@pytest.mark.parametrize("block_size", [4, 8])
def test_a_causal_context_gives_the_hidden_states_of_qwen3_vl(block_size, golden_model, vision):
    """Prefix and clean tokens are then exactly what the autoregressive source computes."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

    model = load(golden_model, "causal", block_size)
    context = conversation(True, [(5, 9), (3, 13)])
    responses = find_responses(context, HEADER, [END])
    layout = sample_layout(len(context), responses, block_size, drop_last_clean_block=False)
    row = TokenIds(torch.zeros_like(layout.block), layout.branch, layout.block, torch.arange(len(layout)))
    ends = torch.tensor([end for _, end in responses])
    source = torch.where(layout.padding, ends[layout.response.clamp_min(0)] - 1, layout.source)
    ids = context[source].masked_fill(layout.branch == NOISY, MASK)
    with torch.no_grad():
        ours = model.model(
            input_ids=ids.unsqueeze(0),
            attention_mask=attention_mask(row, row, context_attention="causal")[None, None],
            position_ids=positions_of(model, context, vision)[:, :, source] + layout.offset,
            **vision,
        )[0]
        source_model = Qwen3VLModel._from_config(model.config, attn_implementation="sdpa").eval()
        source_model.load_state_dict(model.model.state_dict())
        theirs = source_model(
            input_ids=context.unsqueeze(0), mm_token_type_ids=(context == IMAGE).int().unsqueeze(0), **vision
        )[0]
    context_part = layout.branch == CONTEXT
    assert int(context_part.sum()) == len(context)
    torch.testing.assert_close(ours[:, context_part], theirs, rtol=0, atol=1e-4)
