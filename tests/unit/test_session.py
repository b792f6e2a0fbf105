"""A call owns what it needs: calls on one model do not meet, and nothing on the model changes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from golden_data import GOLDEN, golden_arrays

MASK, IMAGE, END, PAD = 509, 500, 505, 506
SETTINGS = {"max_new_tokens": 21, "block_size": 8, "denoising_steps": 4, "mask_token_id": MASK, "eos_token_id": END}
PATHS = [
    {},
    {"decode_path": "plain"},
    {"cache_implementation": "static"},
    {"decode_path": "graph", "remasking_strategy": "low_confidence_static"},
]
PROMPT = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def batches():
    """Four ragged batches: text alone, an image alone, text beside an image, text of other lengths."""
    arrays = golden_arrays("generate", "dynamic_b8_t0.5_image.npz")
    image, g = arrays["input_ids"][0], torch.Generator().manual_seed(0)
    vision = {name: arrays[name] for name in ("pixel_values", "image_grid_thw")}

    def text(length):
        return torch.randint(IMAGE, (length,), generator=g)

    def batch(rows, **extra):
        width = max(len(row) for row in rows)
        ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=PAD) for row in rows])
        mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask, **extra}

    return [
        batch([text(11), text(3)]),
        batch([image], **vision),
        batch([image, text(29)], **vision),
        batch([text(1), text(17), text(6)]),
    ]


@pytest.mark.parametrize("attention", ["sdpa", "eager", "bard"])
def test_calls_of_four_threads_give_what_each_gives_alone(attention, batches):
    from nemo_bard import BardVLForConditionalGeneration

    model = BardVLForConditionalGeneration.from_pretrained(
        GOLDEN / "models/tiny_untied", attn_implementation=attention
    ).train()
    jobs = [(batch, PATHS[(turn + i) % 4]) for turn in range(4) for i, batch in enumerate(batches)]

    def run(job):
        batch, path = job
        return model.generate(batch, pad_token_id=PAD, **SETTINGS, **path)

    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    alone = [run(job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, jobs))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert model.training
    assert model.config.text_config._attn_implementation == attention
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert all(vars(module)[key] is value for key, value in before[name].items())


@pytest.mark.parametrize("path", PATHS[:3], ids=["fast", "plain", "static"])
def test_inside_and_after_inference_mode(path, golden_model):
    model = golden_model("tiny_tied")
    expected = model.generate(PROMPT, **SETTINGS, **path)
    with torch.inference_mode():
        inside = model.generate(PROMPT.clone(), **SETTINGS, **path)
    assert torch.equal(inside, expected)
    assert torch.equal(model.generate(PROMPT, **SETTINGS, **path), expected)


def test_what_outlives_a_call_is_used_again_but_never_by_two_calls(golden_model, monkeypatch):
    from nemo_bard.generation import session
    from nemo_bard.generation.prompt import prepare_prompt
    from nemo_bard.generation.resolve import resolve_settings
    from nemo_bard.generation.settings import BardGenerationConfig

    model = golden_model("tiny_tied")
    monkeypatch.setattr(session, "POOL", session.Pool())
    settings = resolve_settings(model, BardGenerationConfig(**SETTINGS))
    prompt = prepare_prompt(model, {"input_ids": PROMPT}, block_size=8, max_new_tokens=21, end_ids=[END])

    def borrow(one, size, made_for="same"):
        return one.borrow(made_for, fits=lambda thing: thing[0] >= size, make=lambda: [size])

    one, two = (session.Session(model, prompt, settings) for _ in range(2))
    with one, two:
        first, second = borrow(one, 512), borrow(two, 512)
        assert first is not second
    with session.Session(model, prompt, settings) as later:
        assert borrow(later, 300) is first  # the last given back
    with session.Session(model, prompt, settings) as later:
        assert borrow(later, 1024) == [1024]  # too small ones go
    with session.Session(model, prompt, settings) as later:
        third, other = borrow(later, 600), borrow(later, 1, "other")
        assert (third, other) == ([1024], [1])
    broken = session.Session(model, prompt, settings)
    assert borrow(broken, 600) is third
    broken.__exit__(OSError, OSError(), None)
    with session.Session(model, prompt, settings) as later:
        assert borrow(later, 600) is not third  # left half done
    assert len(session.POOL.idle[model]) <= session.KEPT


@pytest.mark.parametrize("ends", [-1, []])
def test_without_an_end_exactly_max_new_tokens_come_out(ends, golden_model):
    model = golden_model("tiny_untied")
    free = model.generate(PROMPT, **SETTINGS)
    trained = golden_model("tiny_untied", block_size=8, mask_token_id=MASK, eos_token_id=int(free[0, 3]))
    assert trained.generate(PROMPT, max_new_tokens=21, denoising_steps=4).shape[1] < 21 == free.shape[1]
    assert torch.equal(trained.generate(PROMPT, max_new_tokens=21, denoising_steps=4, eos_token_id=ends), free)


def test_a_tokenizer_is_accepted(golden_model):
    model = golden_model("tiny_tied")
    assert torch.equal(model.generate(PROMPT, tokenizer=object(), **SETTINGS), model.generate(PROMPT, **SETTINGS))


@pytest.mark.parametrize("path", PATHS[:3], ids=["fast", "plain", "static"])
def test_a_token_that_comes_out_as_the_mask_id_stays_masked(path, golden_model):
    """A model that says nothing else is asked in every step, and its block ends with the last one."""
    model = golden_model("tiny_tied")
    head = model.lm_head.forward
    model.lm_head.forward = lambda hidden: head(hidden).index_fill(-1, torch.tensor([MASK]), 1e4)
    try:
        output = model.generate(
            PROMPT, suppress_mask_token=False, output_history=True, return_dict_in_generate=True, **SETTINGS, **path
        )
    finally:
        del model.lm_head.forward
    assert output.block_step_counts.tolist() == [[4, 4, 4]]
    assert (output.sequences == MASK).all()
    assert not any(record.fixed.any() for record in output.history)
