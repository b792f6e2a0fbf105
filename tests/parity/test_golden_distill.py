"""Distillation from a small-block anchor: forwards, cross-entropy, KD and gradients against the reference's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from golden_data import case_name, golden_arrays, golden_cases

from nemo_bard.losses import top_k_kd

CASES = golden_cases("distill")
LOSS_TOLERANCE = 1e-4


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_distillation_step(case, golden_dir, golden_model):
    from nemo_bard import BardVLForConditionalGeneration

    arrays, golden = golden_arrays("distill", case["file"]), case["f32"]
    student = BardVLForConditionalGeneration.from_pretrained(golden_dir / "models" / case["student"]).eval()
    inputs = {
        name: arrays[name] for name in ("input_ids", "position_ids", "pixel_values", "image_grid_thw") if name in arrays
    }
    positions = arrays["logits_to_keep"].flatten().nonzero().flatten()
    with torch.no_grad():
        anchor_logits = golden_model(case["teacher"])(
            **inputs, attention_mask=arrays["teacher_attention_mask"], output_positions=positions
        ).logits
    top_logits, top_ids = anchor_logits.topk(case["teacher_topk"])
    assert torch.equal(top_ids, arrays["teacher_topk_indices"])
    torch.testing.assert_close(top_logits, arrays["teacher_topk_logits_f32"], rtol=0, atol=1e-3)

    logits = student(**inputs, attention_mask=arrays["student_attention_mask"], output_positions=positions).logits
    assert (logits - arrays["student_logits_f32"]).abs().max() < 1e-3
    ce = F.cross_entropy(logits, arrays["target_tokens"])
    kd = top_k_kd(
        logits,
        top_logits,
        top_ids,
        temperature=case["temperature"],
        direction=case["kl_direction"].removesuffix("-kl"),
    ).mean()
    total = case["ce_weight"] * ce + case["kd_weight"] * kd
    total.backward()
    for value, name in ((ce, "ce_loss"), (kd, "kd_loss"), (total, "total_loss")):
        assert value.item() == pytest.approx(golden[name], rel=LOSS_TOLERANCE)

    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    norms = {
        name: gradients[name].norm().item() if name in gradients else 0.0 for name in golden["grad_norm_per_parameter"]
    }
    assert gradients.keys() <= norms.keys()
    for name, norm in golden["grad_norm_per_parameter"].items():
        # relative to the whole gradient where a parameter's own is tiny
        assert norms[name] == pytest.approx(norm, rel=LOSS_TOLERANCE * 10, abs=1e-5 * golden["grad_norm"]), name
    whole = sum(norm**2 for norm in norms.values()) ** 0.5
    assert whole == pytest.approx(golden["grad_norm"], rel=LOSS_TOLERANCE)
