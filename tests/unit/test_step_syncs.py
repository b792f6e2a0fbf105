"""Whole training steps with tensors that say ``cuda``: the numbers of a CPU, and how often the host waits.

Packed rows with images, several microbatches, activation checkpointing, in float32 and under autocast. flex_attention is
stood in for by what it computes: dense attention under the block mask's own function.
"""

from __future__ import annotations

import copy
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pretend_cuda import CUDA, CudaTensor, PretendCuda, to_cuda
from test_vision import make_config
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.data import DistributedSampler

from nemo_bard import BardVLForConditionalGeneration
from nemo_bard.data.collate import BlockDiffusionCollator, TrainingSample, lay_out_sample
from nemo_bard.method.layout import RowOptions
from nemo_bard.method.losses import BlockDiffusionCrossEntropy, DistillationLoss
from nemo_bard.method.objectives import JointObjective, PBMObjective, SWDObjective
from nemo_bard.method.schedule import NoiseSettings
from nemo_bard.model import attention
from nemo_bard.train import masks
from nemo_bard.train.flops import batch_flops
from nemo_bard.train.pbm import PBMRecipe, _pins
from nemo_bard.train.swd import SWDRecipe

KINDS = ("pbm", "swd", "joint")
SYNCS_OF_A_STEP = {"pbm": 1, "swd": 2, "joint": 2}
"""Reading the loss, and its parts where it has some. Clipping adds one where the norm is logged; with several ranks every sum
over them adds two: four of them before the forward and one behind the optimizer, whatever the number of microbatches."""
CONTEXT = {"pbm": "block", "swd": "block", "joint": "causal"}


def model_of(kind: str, seed: int = 0) -> BardVLForConditionalGeneration:
    torch.manual_seed(seed)
    fields = {"mask_token_id": 59, "eos_token_id": 58, "assistant_header_ids": [57], "block_size": 4}
    model = BardVLForConditionalGeneration(make_config(context_attention=CONTEXT[kind], **fields))
    model.set_attn_implementation("bard")
    return model


def sample(collator: BlockDiffusionCollator, index: int, prompt: int, response: int) -> TrainingSample:
    generator = torch.Generator().manual_seed(index)
    config = collator.config
    grid = torch.tensor([[1, 4, 2 * (index + 1)]])
    image = torch.full((int(grid.prod()) // 4,), config.image_token_id)
    text = [torch.randint(0, 50, (number,), generator=generator) for number in (2, prompt, response)]
    ids = torch.cat([text[0], image, text[1], text[2], torch.tensor([58])])
    start = len(ids) - response - 1
    return lay_out_sample(
        ids,
        collator._positions(ids, {"image_grid_thw": grid}),
        [(start, len(ids))],
        config.block_size,
        options=collator.options,
        sample_index=index,
        pixel_values=torch.randn(int(grid.prod()), 24, generator=generator),
        grid_thw=grid,
    )


def batches_of(kind: str, config: Any) -> list[dict[str, Any]]:
    """Two microbatches, each a row of two samples with images; the second has another length."""
    options = RowOptions(anchor_block_size=2 if kind == "swd" else None, next_token=kind == "joint")
    collator = BlockDiffusionCollator(None, config, pad_to_multiple_of=masks.FLEX_TILE, options=options)
    rows = [
        [sample(collator, 0, 5, 30), sample(collator, 1, 8, 21)],
        [sample(collator, 2, 30, 60), sample(collator, 3, 3, 9)],
    ]
    return [{**collator.stack([row]), "slots": [0, 0], "num_dropped": 0} for row in rows]


def recipe_of(kind: str, model: nn.Module, anchor: nn.Module, device: torch.device, autocast: bool) -> PBMRecipe:
    """A recipe with what a step needs, and nothing else."""
    recipe = object.__new__(SWDRecipe if kind == "swd" else PBMRecipe)
    dataset = range(100)
    context = torch.autocast(device.type, torch.bfloat16, enabled=autocast)
    scheduler = SimpleNamespace(step=0, epoch=0, epoch_len=9, grad_acc_steps=2, max_steps=9, num_epochs=1)
    loss_fn = DistillationLoss(kd_top_k=4) if kind == "swd" else BlockDiffusionCrossEntropy()
    recipe.__dict__.update(
        loss_fn=loss_fn,
        anchor=anchor,
        offload_anchor=False,
        loss_chunk_tokens=16,
        model_parts=[model],
        dist_env=SimpleNamespace(device=device, world_size=1, is_main=True),
        distributed_config=SimpleNamespace(),
        dataloader=SimpleNamespace(sampler=DistributedSampler(dataset, 1, 0), dataset=dataset, batch_size=1),
        step_scheduler=scheduler,
        noise_of_run=SimpleNamespace(at=lambda *_: NoiseSettings(name="mask"), facts=lambda _: {}),
        part_sums=[],
        num_random_ids=50,
        num_dropped=0,
        seed=0,
        compute_dtype=torch.bfloat16 if autocast else torch.float32,
        peft_config=None,
        timestamp=time.perf_counter(),
        pp_enabled=False,
        device_mesh=None,
        moe_mesh=None,
        cfg={},
        checkpointer=SimpleNamespace(maybe_wait_for_staging=lambda: None),
        optimizer=[torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-2)],
        lr_scheduler=None,
        autocast=lambda: context,
        sum_over_ranks=lambda tensor, **_: tensor,
        num_data_ranks=lambda **_: 1,
        _dp_allreduce=lambda tensor, **_: tensor,
        _get_dp_group_size=lambda **_: 1,
        _get_cp_group_size=lambda: 1,
    )
    inner = SWDObjective(loss_fn, recipe._teach) if kind == "swd" else PBMObjective(loss_fn)
    recipe.objective = JointObjective(inner, 0.5) if kind == "joint" else inner
    return recipe


def checkpointed(model: BardVLForConditionalGeneration) -> BardVLForConditionalGeneration:
    for layers in (model.model.language_model.layers, model.model.visual.blocks):
        for index, layer in enumerate(layers):
            layers[index] = checkpoint_wrapper(layer, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
    return model


def flex_on_cpu(log: PretendCuda, seen: list[torch.device]) -> Any:
    """One kernel's launch that gives what flex_attention would give."""

    def attend(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, scale: float | None) -> Tensor:
        assert query.dtype == key.dtype == value.dtype
        seen.append(block_mask.kv_num_blocks.device)
        length = query.shape[2]
        with log.kernel("flex_attention"):
            row, order = torch.zeros(1, 1, 1, dtype=torch.int64, device=CUDA), torch.arange(length, device=CUDA)
            allowed = block_mask.mask_mod(row, row, order.view(1, -1, 1), order.view(1, 1, -1)).unsqueeze(1)
            return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scale, enable_gqa=True)

    return attend


def step(recipe: PBMRecipe, batches: list[dict[str, Any]]) -> tuple[dict[str, Any], list[Tensor]]:
    """One step; its metrics, and the weights after it."""
    metrics = recipe.train_step(copy.deepcopy(batches)).metrics
    return metrics, [p.detach().cpu() for p in recipe.model_parts[0].parameters()]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_waits_as_often_as_it_must(kind: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the waiting is in a microbatch."""
    models = {place: checkpointed(model_of(kind)) for place in ("cpu", "cuda")}
    anchors = {place: model_of(kind, seed=1).eval().requires_grad_(False) for place in ("cpu", "cuda")}
    for anchor in anchors.values():
        anchor.config.block_size = 2
    batches = batches_of(kind, models["cpu"].config)
    want, weights = step(recipe_of(kind, models["cpu"], anchors["cpu"], torch.device("cpu"), autocast), batches)
    with PretendCuda(available=True) as log:
        model, anchor = to_cuda(models["cuda"]), to_cuda(anchors["cuda"])
        recipe = recipe_of(kind, model, anchor, CUDA, autocast)
        seen: list[torch.device] = []
        monkeypatch.setattr(attention, "compiled_flex", lambda: flex_on_cpu(log, seen))
        microbatch, inside = recipe.microbatch, []

        def counted(*args: Any, **kwargs: Any) -> None:
            before = len(log.syncs)
            microbatch(*args, **kwargs)
            inside.append(log.syncs[before:])

        monkeypatch.setattr(recipe, "microbatch", counted, raising=False)
        assert masks.uses_flex(model.config, CUDA)
        log.reset()
        got, moved = step(recipe, batches)
        in_step = log.syncs[: len(log.syncs) - len(moved)]  # reading the weights is the test's
        assert inside == [[], []]
        assert len(in_step) <= SYNCS_OF_A_STEP[kind], in_step
        assert log.mismatches == []
        assert set(seen) == {CUDA}
        assert all(isinstance(p, CudaTensor) for p in model.parameters())
        assert (log.operations["_varlen_attn"] > 0) == autocast
    tolerance = 2e-2 if autocast else 1e-5  # the kernel's numbers are bfloat16's; weights change by the learning rate
    assert got["loss"] == pytest.approx(want["loss"], rel=tolerance)
    assert got.keys() - want.keys() == {"mfu"}
    for a, b in zip(moved, weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4 if autocast else 1e-6)


@pytest.mark.parametrize(
    ("section", "device", "pinned"),
    [
        ({}, "cuda", True),
        ({}, "cpu", False),
        ({"pin_memory": False}, "cuda", False),
        ({"pin_memory": True}, "cpu", True),
    ],
)
def test_batches_are_pinned_where_they_are_copied_to_a_gpu(section: dict[str, bool], device: str, pinned: bool) -> None:
    assert _pins(section, torch.device(device)) == pinned


@pytest.mark.parametrize("device", [CUDA, torch.device("cpu")], ids=str)
def test_collators_fit_the_device(device: torch.device) -> None:
    model = model_of("pbm")
    recipe = recipe_of("pbm", model, model, device, autocast=True)
    recipe.settings, recipe.packing = SimpleNamespace(ar_loss_weight=0), SimpleNamespace(max_length=None)
    recipe.pixel_dtype = torch.bfloat16
    collator = recipe._complete(partial(BlockDiffusionCollator, None), NoiseSettings(name="mask"))
    batch = collator.stack([[]])
    assert batch["pixel_values"].dtype == torch.bfloat16
    assert batch["input_ids"].shape[1] == (256 if device == CUDA else 1)


def test_flops_of_a_step_are_those_of_its_microbatches() -> None:
    model = model_of("swd")
    anchor = model_of("swd", seed=1)
    batches = batches_of("swd", model.config)
    recipe = recipe_of("swd", model, anchor, torch.device("cpu"), autocast=False)
    counted: list[float] = []
    recipe.sum_over_ranks = lambda tensor, **_: counted.append(tensor) or tensor
    seen: list[dict[str, Any]] = []
    weigh = recipe.objective.weigh
    recipe.objective.weigh = lambda batch, totals: seen.append(batch) or weigh(batch, totals)
    step(recipe, batches)
    flops = next(float(x) for x in counted if x.dtype == torch.float64 and x.ndim == 0)
    assert flops == sum(3 * batch_flops(m.config, seen).forward / (1 if m is model else 3) for m in (model, anchor))
