"""Values and gradients of the losses against the reference's, relative to the largest entry."""

from __future__ import annotations

import pytest
import torch
from golden_data import case_name, golden_arrays, golden_cases

from nemo_bard.method.losses import BlockDiffusionCrossEntropy, MixturePathKL, token_scale, top_k_kd

CASES = golden_cases("losses")
DIFFUSION = [case for case in CASES if case["kind"] == "diffusion"]
KD = next(case for case in CASES if case["kind"] == "topk_kd")
DTYPES = {"f32": (torch.float32, 1e-5), "f64": (torch.float64, 1e-8)}


def assert_relative(value: torch.Tensor, golden: torch.Tensor, tolerance: float) -> None:
    assert value.shape == golden.shape
    assert value.dtype == golden.dtype
    assert (value - golden).abs().max() <= tolerance * golden.abs().max()


def runs(mask: torch.Tensor) -> torch.Tensor:
    """Number the contiguous runs of a row-wise mask over the whole tensor, ``-1`` outside."""
    starts = mask & ~torch.nn.functional.pad(mask, (1, 0))[..., :-1]
    number = starts.flatten().cumsum(0).view_as(mask) - 1
    return torch.where(mask, number, -1)


def exact_scale(reduction: str, response_ids: torch.Tensor, case: dict) -> torch.Tensor:
    """``token_scale`` in float64, whose float32 values it checks."""
    inside = response_ids >= 0
    if reduction == "sum":
        scale = inside.double() / case["num_label_tokens"]
    else:
        lengths = torch.bincount(response_ids[inside])
        scale = inside.double() / lengths[response_ids.clamp_min(0)] / case["num_samples"]
    ours = token_scale(
        reduction, response_ids, num_samples=case["num_samples"], num_loss_tokens=case["num_label_tokens"]
    )
    torch.testing.assert_close(ours, scale.float(), rtol=1e-6, atol=0)
    return scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("name", "loss_class"), [("wce", BlockDiffusionCrossEntropy), ("mpg", MixturePathKL)])
@pytest.mark.parametrize("case", DIFFUSION, ids=case_name)
def test_diffusion_losses(case, name, loss_class, reduction, dtype):
    arrays = golden_arrays("losses", case["file"])
    torch_dtype, tolerance = DTYPES[dtype]
    logits = arrays["logits"].to(torch_dtype).requires_grad_()
    response_ids = runs(arrays["response_mask"])
    if reduction == "sum":  # the reference also counts supervised tokens outside of responses
        response_ids = torch.zeros_like(response_ids)
    # The reference writes uniform noise with time reversed.
    t = arrays["t"].double() if name == "wce" else 1 - arrays["t"].double()
    weight = exact_scale(reduction, response_ids, case) / t
    chosen = arrays["loss_mask"]
    value = loss_class(reduction)(
        logits[chosen],
        arrays["labels"][chosen],
        weight=weight[chosen],
        noisy_ids=arrays["x_t"][chosen],
    )
    value.backward()
    assert_relative(value.detach(), arrays[f"{name}_{reduction}_{dtype}"], tolerance)
    assert_relative(logits.grad, arrays[f"{name}_{reduction}_grad_{dtype}"], tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "loss_class"), [("wce", BlockDiffusionCrossEntropy), ("mpg", MixturePathKL)])
@pytest.mark.parametrize("case", DIFFUSION, ids=case_name)
def test_diffusion_losses_of_every_token(case, name, loss_class, dtype):
    arrays = golden_arrays("losses", case["file"])
    torch_dtype, tolerance = DTYPES[dtype]
    t = arrays["t"].to(torch_dtype) if name == "wce" else 1 - arrays["t"].to(torch_dtype)
    per_token = loss_class().per_token(
        arrays["logits"].to(torch_dtype).flatten(0, 1), arrays["labels"].flatten(), arrays["x_t"].flatten()
    )
    assert_relative(per_token.view_as(t) / t, arrays[f"{name}_none_{dtype}"], tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", KD["rows"], ids=lambda row: row["key"])
def test_distillation(row, dtype):
    arrays = golden_arrays("losses", KD["file"])
    torch_dtype, tolerance = DTYPES[dtype]
    student = arrays["student_logits"].to(torch_dtype).requires_grad_()
    per_token = top_k_kd(
        student,
        arrays["teacher_topk_logits"].to(torch_dtype),
        arrays["teacher_topk_indices"],
        temperature=row["temperature"],
        direction=row["direction"].removesuffix("-kl"),
    )
    value = per_token.sum() / (row["num_batch_labels"] or per_token.numel())
    value.backward()
    assert_relative(value.detach(), arrays[f"{row['key']}_{dtype}"], tolerance)
    assert_relative(student.grad, arrays[f"{row['key']}_grad_{dtype}"], tolerance)
