"""Distillation from a small-block anchor: forwards, cross-entropy, KD and gradients against the reference's."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from golden_data import case_name, golden_arrays, golden_cases

from nemo_bard.method.chunked import chunked_loss, chunked_top_k
from nemo_bard.method.losses import DistillationLoss, top_k_kd

CASES = golden_cases("distill")
LOSS_TOLERANCE = 1e-4


def plain(student, anchor, inputs, masks, positions, labels, case):
    """Full logits of both models, and the formulas."""
    with torch.no_grad():
        anchor_logits = anchor(**inputs, attention_mask=masks["anchor"], output_positions=positions).logits
    top_logits, top_ids = anchor_logits.topk(case["teacher_topk"])
    logits = student(**inputs, attention_mask=masks["student"], output_positions=positions).logits
    ce = F.cross_entropy(logits, labels)
    direction = case["kl_direction"].removesuffix("-kl")
    kd = top_k_kd(logits, top_logits, top_ids, temperature=case["temperature"], direction=direction).mean()
    return top_logits, top_ids, ce, kd, case["ce_weight"] * ce + case["kd_weight"] * kd


def chunked(student, anchor, inputs, masks, positions, labels, case, chunk_tokens=3):
    """What the SWD recipe does: a few tokens at a time, no logits kept."""
    loss_fn = DistillationLoss(
        ce_weight=case["ce_weight"],
        kd_weight=case["kd_weight"],
        kd_top_k=case["teacher_topk"],
        kd_temperature=case["temperature"],
        kd_direction=case["kl_direction"].removesuffix("-kl"),
    )
    top_k = partial(chunked_top_k, k=loss_fn.kd_top_k, chunk_tokens=chunk_tokens)
    top = anchor(**inputs, attention_mask=masks["anchor"], output_positions=positions, output_fn=top_k)
    weight, everywhere = torch.full((len(positions),), 1 / len(positions)), torch.ones(len(positions), dtype=torch.bool)
    parts = []

    def loss(logits, part):
        out = loss_fn(
            logits,
            labels[part],
            weight=weight[part],
            anchor_top_logits=top[0][part],
            anchor_top_ids=top[1][part],
            kd_mask=everywhere[part],
        )
        parts.append(torch.stack([out.ce, out.kd]).detach())
        return out.loss

    output_fn = partial(chunked_loss, loss=loss, chunk_tokens=chunk_tokens)
    total = student(**inputs, attention_mask=masks["student"], output_positions=positions, output_fn=output_fn)
    return *top, *torch.stack(parts).sum(0), total


@pytest.mark.parametrize("step", [plain, chunked])
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_distillation_step(case, step, golden_dir, golden_model):
    from nemo_bard import BardVLForConditionalGeneration

    arrays, golden = golden_arrays("distill", case["file"]), case["f32"]
    student = BardVLForConditionalGeneration.from_pretrained(golden_dir / "models" / case["student"]).eval()
    inputs = {
        name: arrays[name] for name in ("input_ids", "position_ids", "pixel_values", "image_grid_thw") if name in arrays
    }
    masks = {"anchor": arrays["teacher_attention_mask"], "student": arrays["student_attention_mask"]}
    positions = arrays["logits_to_keep"].flatten().nonzero().flatten()
    anchor, labels = golden_model(case["teacher"]), arrays["target_tokens"]
    logits = student(**inputs, attention_mask=masks["student"], output_positions=positions).logits
    assert (logits - arrays["student_logits_f32"]).abs().max() < 1e-3
    top_logits, top_ids, ce, kd, total = step(student, anchor, inputs, masks, positions, labels, case)
    assert torch.equal(top_ids, arrays["teacher_topk_indices"])
    torch.testing.assert_close(top_logits, arrays["teacher_topk_logits_f32"], rtol=0, atol=1e-3)
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
