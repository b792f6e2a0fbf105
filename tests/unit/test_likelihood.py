"""How likely a response is: masked draws against every order of finding its tokens, and next tokens against Qwen3-VL."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from golden_data import golden_arrays

from nemo_bard.evaluation.likelihood import make_draws, resolve_method, response_likelihood

MASK, IMAGE, END = 509, 500, 505
PROMPT = [504, 321, 508, 502, *[IMAGE] * 6, 503, 17, 4, 99, END, 508, 504, 507, 508]
RESPONSE = [33, 81, 12, 260, 77, 5]
"""A whole block of four tokens, and two of the next."""


@pytest.fixture(scope="module")
def inputs():
    arrays = golden_arrays("generate", "dynamic_b8_t0.5_image.npz")
    return {
        "input_ids": torch.tensor([PROMPT]),
        **{name: arrays[name] for name in ("pixel_values", "image_grid_thw")},
    }


@pytest.fixture(scope="module")
def load(golden_model):
    def made(context_attention):
        return golden_model(
            "tiny_untied",
            context_attention=context_attention,
            block_size=4,
            mask_token_id=MASK,
            eos_token_id=END,
            assistant_header_ids=[504, 507, 508],
        )

    return made


def canvas_log_probs(model, inputs, response):
    """``f(block, canvas)``: log-probabilities ``[B, V]`` of the decoder for a canvas of a block, earlier blocks committed."""
    from nemo_bard.generation.prompt import prepare_prompt
    from nemo_bard.generation.resolve import resolve_settings
    from nemo_bard.generation.session import Session
    from nemo_bard.generation.settings import BardGenerationConfig

    settings = resolve_settings(model, BardGenerationConfig(max_new_tokens=8, decode_path="plain"))
    prompt = prepare_prompt(model, dict(inputs), block_size=4, max_new_tokens=8, end_ids=[END])
    engine = settings.engine(session := Session(model, prompt, settings))
    positions = torch.arange(4)
    session.encode_vision()
    engine.first(torch.full((1, 4), MASK), positions)

    def look(block, canvas):
        if look.block < block:
            engine.advance(torch.tensor([response[:4]]), canvas.unsqueeze(0), positions)
            look.block = block
        return engine.step(canvas.unsqueeze(0), positions).log_softmax(-1)

    look.block = 0
    return look


def mean_over_orders(look, response):
    """The bound from its other side: tokens of a block found one by one, in every order, by the decoder."""
    total = 0.0
    for block in range(2):
        tokens = response[4 * block : 4 * block + 4]
        known: dict[tuple[int, ...], torch.Tensor] = {}
        orders = list(permutations(range(len(tokens))))
        for order in orders:
            for number, place in enumerate(order):
                seen = tuple(sorted(order[:number]))
                if seen not in known:
                    canvas = torch.full((4,), MASK)
                    canvas[list(seen)] = torch.tensor([tokens[i] for i in seen], dtype=torch.int64)
                    known[seen] = look(block, canvas)
                total += known[seen][place, tokens[place]].item() / len(orders)
    return total


@pytest.mark.parametrize("context_attention", ["block", "causal"])
def test_all_masks_give_the_mean_over_all_orders_of_decoding(context_attention, load, inputs):
    model = load(context_attention)
    with torch.no_grad():
        expected = mean_over_orders(canvas_log_probs(model, inputs, RESPONSE), RESPONSE)
    found = response_likelihood(model, inputs, torch.tensor(RESPONSE), method="estimated", draws=15)
    assert found.log_prob == pytest.approx(expected, abs=1e-3)  # sums of six log-probabilities, shapes differ
    assert (found.num_tokens, found.method) == (6, "estimated")


def test_drawn_masks_estimate_the_same_bound_and_a_seed_fixes_them(load, inputs):
    model = load("block")

    def find(**settings):
        return response_likelihood(model, inputs, torch.tensor(RESPONSE), method="estimated", **settings).log_prob

    bound = find(draws=15)
    found = [find(draws=8, seed=seed) for seed in range(24)]
    mean, spread = sum(found) / len(found), torch.tensor(found).std().item()
    assert spread > 0
    assert abs(mean - bound) < 4 * spread / math.sqrt(len(found))
    assert find(draws=8, seed=3) == found[3]


def test_a_response_of_one_token_has_no_chance_in_it(load, inputs):
    with torch.no_grad():
        look = canvas_log_probs(load("block"), inputs, [33])
        expected = look(0, torch.full((4,), MASK))[0, 33].item()
    found = response_likelihood(load("block"), inputs, torch.tensor([33]), draws=1, seed=9)
    assert found.log_prob == pytest.approx(expected, abs=1e-4)


def test_exact_is_what_the_autoregressive_source_says(load, inputs):
    from transformers import Qwen3VLForConditionalGeneration

    model = load("causal")
    source = Qwen3VLForConditionalGeneration._from_config(model.config, attn_implementation="sdpa").eval()
    source.load_state_dict(model.state_dict())
    ids = torch.tensor([PROMPT + RESPONSE])
    with torch.no_grad():
        logits = source(
            input_ids=ids,
            mm_token_type_ids=(ids == IMAGE).int(),
            pixel_values=inputs["pixel_values"],
            image_grid_thw=inputs["image_grid_thw"],
        ).logits[0, len(PROMPT) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(RESPONSE).unsqueeze(1)).sum().item()
    found = response_likelihood(model, inputs, torch.tensor(RESPONSE))
    assert found.method == "exact"
    assert found.log_prob == pytest.approx(expected, abs=1e-3)


def test_many_draws_are_split_over_forwards_without_changing_the_sum(load, inputs, monkeypatch):
    from nemo_bard.evaluation import likelihood

    model = load("block")
    whole = response_likelihood(model, inputs, torch.tensor(RESPONSE), draws=11)
    monkeypatch.setattr(likelihood, "NOISY_TOKENS", 24)
    parts = response_likelihood(model, inputs, torch.tensor(RESPONSE), draws=11)
    assert parts.log_prob == pytest.approx(whole.log_prob, abs=1e-3)


@pytest.mark.parametrize(("tokens", "draws"), [(6, 15), (6, 4), (9, 100), (1, 1)])
def test_weights_make_every_token_count_once_where_all_log_probabilities_are_alike(tokens, draws):
    """With ``log p = -1`` everywhere, each order of a block gives minus its number of tokens."""
    chosen = make_draws(tokens, 4, draws, seed=1)
    assert chosen.weights.sum().item() == pytest.approx(tokens, rel=1e-5)
    assert bool((chosen.masks | (chosen.weights == 0)).all())
    assert bool(chosen.masks[:, tokens:].all())


def test_what_cannot_be_done_is_refused(load, inputs):
    with pytest.raises(ValueError, match="loglikelihood=exact needs a checkpoint with context_attention: causal"):
        resolve_method("exact", "block")
    with pytest.raises(ValueError, match="did you mean 'exact'"):
        resolve_method("exakt", "causal")
    with pytest.raises(ValueError, match="holds no token"):
        response_likelihood(load("block"), inputs, torch.tensor([], dtype=torch.int64))
    with pytest.raises(ValueError, match="placeholder"):
        response_likelihood(load("block"), inputs, torch.tensor([IMAGE]))
