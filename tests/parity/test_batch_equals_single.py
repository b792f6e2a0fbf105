"""Every row of a batch gets what it would get alone: exact ids and steps, whatever stands beside it."""

from __future__ import annotations

import pytest
import torch
from golden_data import golden_arrays

MASK, IMAGE, END, PAD = 509, 500, 505, 506
PATHS = {
    "fast": {},
    "plain": {"decode_path": "plain"},
    "static": {"cache_implementation": "static"},
}
SETTINGS = {
    "max_new_tokens": 21,  # no multiple of the block size
    "block_size": 8,
    "denoising_steps": 4,
    "mask_token_id": MASK,
    "eos_token_id": END,
    "pad_token_id": PAD,
}


@pytest.fixture(scope="module")
def prompts():
    """Five prompts: text, one image, two images, a longer text, one token."""
    arrays = golden_arrays("generate", "dynamic_b8_t0.5_image.npz")
    other = golden_arrays("generate", "static_b8_image.npz")
    g = torch.Generator().manual_seed(0)

    def text(length):
        return torch.randint(IMAGE, (length,), generator=g)

    image = [502, *[IMAGE] * 6, 503]
    pixels, grid = arrays["pixel_values"], arrays["image_grid_thw"]
    return [
        ({"input_ids": text(11)}),
        {"input_ids": arrays["input_ids"][0], "pixel_values": pixels, "image_grid_thw": grid},
        {
            "input_ids": torch.cat([text(3), torch.tensor(image), text(2), torch.tensor(image), text(5)]),
            "pixel_values": torch.cat([other["pixel_values"], pixels]),
            "image_grid_thw": torch.cat([other["image_grid_thw"], grid]),
        },
        ({"input_ids": text(29)}),
        ({"input_ids": text(1)}),
    ]


def batch_of(prompts, side: str):
    width = max(len(p["input_ids"]) for p in prompts)
    ids, mask = torch.full((len(prompts), width), PAD), torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        size = len(prompt["input_ids"])
        where = slice(width - size, width) if side == "left" else slice(0, size)
        ids[row, where], mask[row, where] = prompt["input_ids"], 1
    batch = {"input_ids": ids, "attention_mask": mask}
    for name in ("pixel_values", "image_grid_thw"):
        parts = [p[name] for p in prompts if name in p]
        if parts:
            batch[name] = torch.cat(parts)
    return batch


def single(model, prompt, **settings):
    prompt = {**prompt, "input_ids": prompt["input_ids"].unsqueeze(0)}
    return model.generate(prompt, return_dict_in_generate=True, **settings)


def assert_rows_equal_singles(model, prompts, output, **settings):
    for row, prompt in enumerate(prompts):
        alone = single(model, prompt, **settings)
        length = int(alone.lengths[0])
        assert int(output.lengths[row]) == length
        assert output.sequences[row, :length].tolist() == alone.sequences[0].tolist()
        assert (output.sequences[row, length:] == PAD).all()
        blocks = alone.block_step_counts.shape[1]
        assert output.block_step_counts[row, :blocks].tolist() == alone.block_step_counts[0].tolist()
        assert not output.block_step_counts[row, blocks:].any()
        assert output.tokens_per_forward[row] == alone.tokens_per_forward[0]
        assert output.commit_forwards[row] == alone.commit_forwards[0]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("strategy", ["low_confidence_static", "low_confidence_dynamic", "entropy_bound", "revision"])
def test_rows_equal_their_own_single_runs(strategy, side, path, golden_model, prompts):
    settings = {**SETTINGS, **PATHS[path]}
    if strategy == "revision":
        settings |= {"edit_threshold": 0.3, "max_post_edit_steps": 3}
    else:
        settings["remasking_strategy"] = strategy
    model = golden_model("tiny_untied")
    output = model.generate(batch_of(prompts, side), return_dict_in_generate=True, **settings)
    assert output.sequences.shape == (len(prompts), 21)
    assert_rows_equal_singles(model, prompts, output, **settings)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("model_name", ["tiny_tied", "tiny_untied"])
def test_rows_stop_at_their_own_ends(model_name, path, golden_model, prompts):
    """With several end ids, so that the rows end in different blocks."""
    model = golden_model(model_name)
    free = {**SETTINGS, **PATHS[path], "max_new_tokens": 32}
    rows = [single(model, prompt, **free).sequences[0].tolist() for prompt in prompts]
    ends = [rows[0][1], rows[1][12], rows[3][-1]]
    settings = {**free, "eos_token_id": ends}
    output = model.generate(batch_of(prompts, "left"), return_dict_in_generate=True, **settings)
    expected = [next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in rows]
    assert output.lengths.tolist() == expected
    assert len({-(-length // 8) for length in expected}) > 1
    assert output.sequences.shape[1] == max(expected)
    assert_rows_equal_singles(model, prompts, output, **settings)


def test_ended_rows_cost_nothing(golden_model, prompts):
    """The language model runs fewer rows once some have ended."""
    model = golden_model("tiny_untied")
    free = {**SETTINGS, "max_new_tokens": 32}
    ends = [int(single(model, prompt, **free).sequences[0, 2]) for prompt in prompts[:2]]
    sizes = []
    handle = model.model.language_model.register_forward_hook(
        lambda _m, _a, kwargs, _o: sizes.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    try:
        output = model.generate(
            batch_of(prompts, "left"), return_dict_in_generate=True, **{**free, "eos_token_id": ends}
        )
    finally:
        handle.remove()
    assert output.forwards == len(sizes)
    assert sizes[0] == len(prompts)
    assert sizes == sorted(sizes, reverse=True)
    last_block_rows = int((output.block_step_counts[:, -1] > 0).sum())
    assert sizes[-1] == last_block_rows < len(prompts)


@pytest.mark.parametrize("max_new_tokens", [1, 7, 8, 9, 21])
def test_max_new_tokens_is_exact_and_a_prefix_of_the_longer_run(max_new_tokens, golden_model, prompts):
    model = golden_model("tiny_tied")
    batch = batch_of(prompts[:2], "left")
    long = model.generate(batch, **{**SETTINGS, "max_new_tokens": 24})
    short = model.generate(batch, **{**SETTINGS, "max_new_tokens": max_new_tokens})
    assert short.shape == (2, max_new_tokens)
    assert torch.equal(short, long[:, :max_new_tokens])


def test_padding_needs_no_particular_id(golden_model, prompts):
    """Ids under the padding are never read, not even image placeholders."""
    model = golden_model("tiny_tied")
    batch = batch_of(prompts, "left")
    expected = model.generate(batch, **SETTINGS)
    padding = batch["attention_mask"] == 0
    for filler in (0, IMAGE, MASK):
        assert torch.equal(
            model.generate({**batch, "input_ids": batch["input_ids"].masked_fill(padding, filler)}, **SETTINGS),
            expected,
        )


def test_both_calls_give_the_same(golden_model, prompts):
    """The model card's positional batch, transformers' keyword tensors, and bare ids."""
    from transformers import BatchFeature

    from nemo_bard import BardGenerationConfig

    model = golden_model("tiny_tied")
    batch = batch_of(prompts, "left")
    expected = model.generate(BatchFeature(batch), **SETTINGS)
    assert torch.equal(model.generate(**batch, generation_config=BardGenerationConfig(**SETTINGS)), expected)
    ids = prompts[0]["input_ids"].unsqueeze(0)
    assert torch.equal(model.generate(ids, **SETTINGS), model.generate(input_ids=ids, **SETTINGS))
    types = (batch["input_ids"] == IMAGE).int()
    assert torch.equal(model.generate({**batch, "mm_token_type_ids": types}, **SETTINGS), expected)


def test_sampling_is_decided_by_the_generator(golden_model, prompts):
    model = golden_model("tiny_tied")
    batch = batch_of(prompts, "left")
    settings = {**SETTINGS, "temperature": 1.0, "top_k": 50, "top_p": 0.95}
    first = model.generate(batch, generator=torch.Generator().manual_seed(1), **settings)
    torch.manual_seed(5)
    again = model.generate(batch, generator=torch.Generator().manual_seed(1), **settings)
    other = model.generate(batch, generator=torch.Generator().manual_seed(2), **settings)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not (first == MASK).any()
