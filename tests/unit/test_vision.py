"""The vision tower and where its features go: transformers' numbers, and no host synchronisation."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from pretend_cuda import PretendCuda, to_cuda
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from nemo_bard import BardVLConfig, BardVLForConditionalGeneration
from nemo_bard.model import sequences
from nemo_bard.upstream.views import view

IMAGES, VIDEOS = [[1, 4, 6], [1, 8, 4]], [[3, 4, 4]]


def make_config(vision_heads: int = 2, **fields: Any) -> BardVLConfig:
    return BardVLConfig(
        text_config={
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": vision_heads,
            "out_hidden_size": 32,
            "patch_size": 2,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=60,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
        **fields,
    )


def make_inputs(*, videos: bool, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """One row with two images, and perhaps a video, between text."""
    torch.manual_seed(1)
    media = [(60, IMAGES), *([(61, VIDEOS)] if videos else [])]
    ids = [torch.randint(0, 50, (3,))]
    for token, grids in media:
        for time, height, width in grids:
            for _ in range(time):
                ids += [torch.full((height * width // 4,), token), torch.randint(0, 50, (2,))]
    row = torch.cat(ids)
    inputs: dict[str, Any] = {"input_ids": row[None], "mm_token_type_ids": ((row == 60) + 2 * (row == 61)).int()[None]}
    for (_, grids), name in zip(media, ("image", "video"), strict=False):
        patches = sum(t * h * w for t, h, w in grids)
        pixels = "pixel_values" if name == "image" else "pixel_values_videos"
        inputs[pixels] = torch.randn(patches, 3 * 2 * 2 * 2, dtype=dtype)
        inputs[f"{name}_grid_thw"] = torch.tensor(grids)
    return inputs


def pair(dtype: torch.dtype, implementation: str) -> tuple[nn.Module, nn.Module]:
    """transformers' model and ours with the same weights."""
    torch.manual_seed(0)
    ours = BardVLForConditionalGeneration(make_config()).to(dtype)
    theirs = Qwen3VLForConditionalGeneration(make_config()).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    for model, name in ((ours, implementation), (theirs, "sdpa")):
        model.set_attn_implementation(name)
    return theirs, ours


def direction(hidden: Tensor) -> Tensor:
    """A scalar whose gradient is not small: what a norm makes of its input has a constant square."""
    weights = torch.linspace(-1, 1, hidden.numel(), device=hidden.device).to(hidden.dtype)
    return (hidden * weights.view(hidden.shape)).sum()


def run(model: Qwen3VLModel, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states, and gradients of a function of them."""
    hidden = model(**inputs, use_cache=False).last_hidden_state
    direction(hidden).backward()
    grads = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return hidden.detach().cpu(), grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", ["bard", "sdpa"])
@pytest.mark.parametrize("videos", [False, True], ids=["images", "images and a video"])
def test_numbers_are_those_of_transformers(dtype: torch.dtype, implementation: str, videos: bool) -> None:
    theirs, ours = pair(dtype, implementation)
    inputs = make_inputs(videos=videos, dtype=dtype)
    want, want_grads = run(theirs.model, inputs)
    got, grads = run(ours.model, inputs)
    # "sdpa" throughout is exact; "bard" repeats no keys, and its norm's gradient is rounded elsewhere
    close = {"atol": 0, "rtol": 0} if implementation == "sdpa" and dtype == torch.float32 else {}
    torch.testing.assert_close(got, want, **close)
    assert grads.keys() == want_grads.keys()
    for name, grad in grads.items():
        scale = want_grads[name].abs().max().item()
        torch.testing.assert_close(
            grad,
            want_grads[name],
            rtol=0,
            atol=scale * (1e-5 if dtype == torch.float32 else 0.1),
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_vision_features_are_those_of_transformers_to_the_last_bit() -> None:
    theirs, ours = pair(torch.float32, "bard")
    inputs = make_inputs(videos=True)
    pixels, grid = inputs["pixel_values"], inputs["image_grid_thw"]
    want, got = theirs.model.get_image_features(pixels, grid), ours.model.get_image_features(pixels, grid)
    lists = ours.model(**{**inputs, "image_grid_thw": IMAGES, "video_grid_thw": VIDEOS}).last_hidden_state
    assert all(torch.equal(a, b) for a, b in zip(want.pooler_output, got.pooler_output, strict=True))
    for a, b in zip(want.deepstack_features, got.deepstack_features, strict=True):
        assert torch.equal(torch.cat(a), torch.cat(b))
    assert torch.equal(lists, ours.model(**inputs).last_hidden_state)


def test_hidden_states_can_be_asked_for() -> None:
    theirs, ours = pair(torch.float32, "sdpa")
    inputs = make_inputs(videos=False)
    want, got = (model(**inputs, output_hidden_states=True).hidden_states for model in (theirs, ours))
    assert len(got) == len(want) == 4
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_too_few_placeholders_raise() -> None:
    _, ours = pair(torch.float32, "bard")
    inputs = make_inputs(videos=False)
    inputs["input_ids"][0, 3] = 5
    with pytest.raises(ValueError, match="the number of image tokens is not the number of image features, 14"):
        ours.model(**inputs)


def test_a_view_of_a_model_decodes_with_our_backend_in_the_vision_tower_too() -> None:
    _, ours = pair(torch.float32, "sdpa")
    seen = view(ours, "bard")
    assert seen.model.visual.config._attn_implementation == seen.model.visual.blocks[0].attn.config._attn_implementation
    assert seen.model.visual.config._attn_implementation == "bard"
    assert ours.model.visual.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("implementation", ["bard", "sdpa"])
def test_the_host_never_waits(implementation: str) -> None:
    """Forward and backward in bfloat16; grids are lists, as FSDP would move tensors to the device."""
    theirs, ours = pair(torch.bfloat16, implementation)
    inputs = make_inputs(videos=True, dtype=torch.bfloat16)
    positions, _ = ours.model.get_rope_index(**{k: v for k, v in inputs.items() if not k.startswith("pixel")})
    want, want_grads = run(theirs.model, {**inputs, "position_ids": positions})
    with PretendCuda() as log:
        to_cuda(ours)
        moved = {k: v.to("cuda") for k, v in {**inputs, "position_ids": positions}.items() if "grid" not in k}
        log.reset()
        hidden = ours.model(**moved, image_grid_thw=IMAGES, video_grid_thw=VIDEOS, use_cache=False).last_hidden_state
        direction(hidden).backward()
        assert log.syncs == []
        assert log.mismatches == []
        towers, blocks = 2, 2
        calls = towers * blocks if implementation == "bard" else 0
        assert log.operations["_varlen_attn"] == log.operations["_varlen_attn_backward"] == calls
        torch.testing.assert_close(hidden.cpu(), want, atol=0.1, rtol=0.1)
        for name, parameter in ours.model.named_parameters():
            scale = want_grads[name].abs().max().item()
            torch.testing.assert_close(parameter.grad.cpu(), want_grads[name], rtol=0, atol=0.1 * scale)


@pytest.mark.parametrize(("heads", "dtype", "reason"), [(8, torch.bfloat16, "4 values"), (2, torch.float32, "float32")])
def test_what_the_kernel_does_not_take_is_told_once(
    heads: int, dtype: torch.dtype, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    sequences._tell.cache_clear()
    model = BardVLForConditionalGeneration(make_config(heads)).to(dtype)
    model.set_attn_implementation("bard")
    inputs = make_inputs(videos=False, dtype=dtype)
    want = model.model.visual(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    with PretendCuda() as log, caplog.at_level(logging.WARNING):
        to_cuda(model)
        pixels = inputs["pixel_values"].to("cuda")
        log.reset()
        for _ in range(2):
            got = model.model.visual(pixels, IMAGES).pooler_output
        assert log.syncs == []
        torch.testing.assert_close(got.cpu(), want, atol=1e-3, rtol=1e-2)
    assert [record.message for record in caplog.records if reason in record.message] == [
        record.message for record in caplog.records
    ]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("head", [64, 72])
def test_the_kernel_takes_the_heads_of_qwen3_vl(head: int) -> None:
    with PretendCuda():
        assert sequences._why_not_kernel(torch.bfloat16, head, torch.device("cuda")) is None


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["autocast", "bfloat16"])
def test_pixels_in_the_compute_dtype_give_the_same_numbers(stored: torch.dtype) -> None:
    """The first product rounds them: under autocast, and with the weights that FSDP gathers in bfloat16."""
    _, model = pair(stored, "bard")
    inputs = make_inputs(videos=False)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=stored == torch.float32):
            found.append(run(model.model, {**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(grad, found[1][1][name]) for name, grad in found[0][1].items())
