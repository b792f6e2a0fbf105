"""Logits of training forwards against the reference's, through checkpoints as transformers 4.57 wrote them."""

from __future__ import annotations

import pytest
import torch
from golden_data import case_name, golden_arrays, golden_cases

CASES = golden_cases("model_forward")
TOLERANCE = 1e-3
"""On logits with a standard deviation of 4; the reference's own float32 error is up to 6e-5."""


def model_inputs(case: dict, arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = ["input_ids", "attention_mask", "position_ids", *case["vision_keys"]]
    return {name: arrays[name] for name in names}


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_logits(case, golden_model):
    arrays = golden_arrays("model_forward", case["file"])
    model = golden_model(case["model"])
    with torch.no_grad():
        logits = model(**model_inputs(case, arrays)).logits
    meaningful = arrays["attention_mask"][:, 0].any(-1)
    assert logits.shape == arrays["logits_f32"].shape
    for name in ("logits_f32", "logits_f64", "logits_f64x"):
        assert (logits - arrays[name])[meaningful].abs().max() < TOLERANCE


@pytest.mark.parametrize("case", [c for c in CASES if c["vision_keys"]], ids=case_name)
def test_image_features(case, golden_model):
    arrays = golden_arrays("model_forward", case["file"])
    with torch.no_grad():
        features = golden_model(case["model"]).get_image_features(
            arrays["pixel_values"], arrays["image_grid_thw"], return_dict=True
        )
    torch.testing.assert_close(torch.cat(features.pooler_output), arrays["image_embeds_f32"], rtol=0, atol=1e-4)
    deepstack = torch.stack([torch.cat(layer) for layer in features.deepstack_features])
    torch.testing.assert_close(deepstack, arrays["image_deepstack_f32"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("attention", ["bard", "sdpa"])
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_every_backend_gives_these_logits(case, attention, golden_dir):
    import nemo_bard.model.attention  # noqa: F401  registers the backend
    from nemo_bard import BardVLForConditionalGeneration

    model = BardVLForConditionalGeneration.from_pretrained(
        golden_dir / "models" / case["model"], attn_implementation=attention
    ).eval()
    arrays = golden_arrays("model_forward", case["file"])
    with torch.no_grad():
        logits = model(**model_inputs(case, arrays)).logits
    meaningful = arrays["attention_mask"][:, 0].any(-1)
    assert (logits - arrays["logits_f64x"])[meaningful].abs().max() < TOLERANCE


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_output_positions_are_rows_of_the_full_logits(case, golden_model):
    arrays = golden_arrays("model_forward", case["file"])
    model = golden_model(case["model"])
    positions = arrays["loss_mask"].flatten().nonzero().flatten()
    with torch.no_grad():
        full = model(**model_inputs(case, arrays)).logits.flatten(0, 1)
        some = model(**model_inputs(case, arrays), output_positions=positions).logits
    torch.testing.assert_close(some, full[positions], rtol=1e-5, atol=1e-5)
