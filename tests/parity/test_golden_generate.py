"""Decoding traces of the reference: exact ids, steps per block and what every step saw, on every path."""

from __future__ import annotations

import pytest
import torch
from golden_data import case_name, golden_arrays, golden_cases

CASES = golden_cases("generate")
PATHS = {
    "fast": {},
    "plain": {"decode_path": "plain"},
    "static": {"cache_implementation": "static"},
}


def prompt_of(arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = ("input_ids", "pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
    return {name: arrays[name] for name in names if name in arrays}


def decode(model, case, arrays, **settings):
    from transformers import BatchFeature

    return model.generate(
        BatchFeature(prompt_of(arrays)), **{**case["settings"], "suppress_mask_token": False, **settings}
    )


def expected_ids(case: dict, arrays: dict[str, torch.Tensor]) -> list[int]:
    """Up to ``max_new_tokens`` and the first end."""
    ids = arrays["generated_ids"][0, : case["settings"]["max_new_tokens"]].tolist()
    end = case["settings"]["eos_token_id"]
    return ids[: ids.index(end) + 1] if end in ids else ids


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_trace(case, path, golden_model):
    arrays = golden_arrays("generate", case["file"])
    model = golden_model(case["model"])
    ids, stats = decode(model, case, arrays, return_step_stats=True, **PATHS[path])
    assert ids.tolist() == [expected_ids(case, arrays)]
    assert torch.equal(stats["block_step_counts"].cpu(), arrays["block_step_counts"])
    assert stats["num_denoising_steps"] == [case["num_denoising_steps"]]
    assert stats["num_response_tokens"] == [ids.shape[1]]
    assert stats["tpf"][0] == pytest.approx(ids.shape[1] / case["num_denoising_steps"])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_every_step_saw_what_the_reference_saw(case, path, golden_model):
    arrays = golden_arrays("generate", case["file"])
    mask_id, size = case["settings"]["mask_token_id"], case["settings"]["block_size"]
    output = decode(
        golden_model(case["model"]), case, arrays, output_history=True, return_dict_in_generate=True, **PATHS[path]
    )
    history, step_inputs = output.history, arrays["step_input_ids"]
    assert len(history) == len(step_inputs)
    canvas = torch.full((size,), mask_id)
    for record, seen, best, confidence in zip(
        history, step_inputs, arrays["step_x0"], arrays["step_conf_f64x"], strict=True
    ):
        if record.step == 0:
            canvas = torch.full((size,), mask_id)
        assert torch.equal(canvas, seen)
        masked = canvas == mask_id
        canvas = record.ids[0]
        changed = record.fixed[0]
        assert torch.equal(canvas[changed], best[changed])
        assert torch.equal(canvas[~changed], seen[~changed])
        # float32 forwards through the cache; probabilities of logits with a standard deviation of 4
        torch.testing.assert_close(record.confidence[0][masked].double(), confidence[masked], rtol=0, atol=1e-4)
        assert record.confidence[0][~masked].isnan().all()


class Count:
    """Counts calls of a module and rows of its input."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module, self.calls, self.rows = module, 0, []

    def __enter__(self):
        def hook(_module, args, kwargs, _output) -> None:
            self.calls += 1
            if args:
                self.rows.append(args[0].flatten(0, -2).shape[0])

        self.handle = self.module.register_forward_hook(hook, with_kwargs=True)
        return self

    def __exit__(self, *_):
        self.handle.remove()


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_a_look_every_few_steps_costs_few_forwards(case, golden_model):
    """On the device commits and the prompt ride on denoising forwards too, and the LM head runs for the block alone."""
    from nemo_bard.generation.graph import FLAG_STEPS

    arrays = golden_arrays("generate", case["file"])
    model, size = golden_model(case["model"]), case["settings"]["block_size"]
    with Count(model.lm_head) as head:
        output = decode(model, case, arrays, return_dict_in_generate=True, **PATHS["static"])
    assert head.calls == output.forwards < case["num_denoising_steps"] + FLAG_STEPS
    assert set(head.rows) == {size}
    assert output.commit_forwards.tolist() == [0]


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_at_most_one_forward_per_step_and_no_logits_of_the_prompt(case, golden_model):
    """Commits and the prompt ride on denoising forwards; the LM head runs where a token is masked, nowhere else."""
    arrays = golden_arrays("generate", case["file"])
    model = golden_model(case["model"])
    with Count(model.model.language_model) as text, Count(model.lm_head) as head, Count(model.model.visual) as vision:
        output = decode(model, case, arrays, return_dict_in_generate=True)
    assert text.calls == output.forwards == case["num_denoising_steps"]
    masked = (arrays["step_input_ids"] == case["settings"]["mask_token_id"]).sum(1)
    assert head.rows == masked.tolist()
    assert vision.calls == ("pixel_values" in arrays)
    assert output.commit_forwards.tolist() == [0]
    tokens = len(expected_ids(case, arrays))
    assert output.tokens_per_forward.tolist() == pytest.approx([tokens / case["num_denoising_steps"]])


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_the_plain_path_commits_separately(case, golden_model):
    arrays = golden_arrays("generate", case["file"])
    model = golden_model(case["model"])
    with Count(model.model.language_model) as text:
        output = decode(model, case, arrays, return_dict_in_generate=True, **PATHS["plain"])
    commits = arrays["block_step_counts"].shape[1] - 1
    assert output.commit_forwards.tolist() == [commits]
    assert text.calls == output.forwards == 1 + case["num_denoising_steps"] + commits
    tokens = len(expected_ids(case, arrays))
    assert output.tokens_per_forward.tolist() == pytest.approx([tokens / (case["num_denoising_steps"] + commits)])
    assert output.tokens_per_denoising_forward.tolist() == pytest.approx([tokens / case["num_denoising_steps"]])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_the_mask_id_never_comes_out(case, path, golden_model):
    arrays = golden_arrays("generate", case["file"])
    ids = decode(golden_model(case["model"]), case, arrays, suppress_mask_token=True, **PATHS[path])
    assert not (ids == case["settings"]["mask_token_id"]).any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("model_name", ["tiny_tied", "tiny_untied"])
def test_a_model_in_love_with_the_mask_id_never_emits_it(model_name, path, golden_model):
    """Golden traces rarely prefer it, so here its logit is the largest everywhere."""
    model = golden_model(model_name)
    original = model.lm_head.forward
    try:
        model.lm_head.forward = lambda hidden: original(hidden).index_fill(-1, torch.tensor([509]), 1e4)
        ids = model.generate(
            torch.tensor([[5, 6, 7]]),
            max_new_tokens=8,
            block_size=4,
            mask_token_id=509,
            eos_token_id=505,
            **PATHS[path],
        )
    finally:
        del model.lm_head.forward
    assert ids.shape == (1, 8)
    assert not (ids == 509).any()
