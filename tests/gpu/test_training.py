"""Training on one GPU: the recipe against a CPU, bfloat16 with activation checkpointing and resuming, FSDP2, host waits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_pbm
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

STEPS = 3
DRIVER = Path(test_pbm.__file__).with_name("pbm_driver.py")
TIGHT = 1e-3
"""Relative. Sums of a GPU have no fixed order (scattered gradients of embeddings), and AdamW amplifies that in small gradients."""
TF32 = 1e-2
"""Relative, of float32 on a GPU against a CPU: flex's kernel may round products to 10 bits."""
BF16 = 5e-2
"""Relative, of a gradient norm in bfloat16 against float32: 8 bits."""


def train(jobs: list[dict], folder: Path, device: str) -> None:
    """Run jobs of ``pbm_driver.py`` in one process on a device, as one rank of a torchrun job (nccl on a GPU)."""
    file = folder / f"jobs_{device}.json"
    file.write_text(json.dumps(jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    done = subprocess.run(
        [*start, str(DRIVER), str(file)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def jobs_of(folder: Path, start: Path, data: Path) -> Callable[..., dict]:
    def job(name: str, **changes: Any) -> dict:
        where = {
            "model.pretrained_model_name_or_path": str(start),
            "dataset.path": str(data),
            "checkpoint.checkpoint_dir": str(folder / name),
            "step_scheduler.max_steps": STEPS,
            "step_scheduler.val_every_steps": 100,
        }
        return {"overrides": {**test_pbm.TRAIN, **where, **changes}}

    return job


def largest_difference(folder: Path, first: str, second: str, key: str) -> float:
    """Relative, over all steps."""
    a, b = (test_pbm.read_log(folder / name) for name in (first, second))
    assert [line["step"] for line in a] == [line["step"] for line in b] == list(range(STEPS))
    return max(abs(x[key] - y[key]) / abs(y[key]) for x, y in zip(a, b, strict=True))


BFLOAT16 = {"compute_dtype": "bfloat16", "distributed.activation_checkpointing": True}
PACKED = {
    "compute_dtype": "float32",
    "packing.max_length": 256,
    "step_scheduler.global_batch_size": 2,
    "step_scheduler.local_batch_size": 1,
}


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def runs(request, start, tmp_path_factory) -> tuple[Path, str]:
    """Folder of the runs, and their device; runs with ``_cpu`` in their name are float32 on a CPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")
    folder = tmp_path_factory.mktemp("runs")
    data = test_pbm.write_data(folder / "data", 11)
    job = jobs_of(folder, start, data)
    plain, no_recomputation = {"compute_dtype": "float32"}, {"compute_dtype": "bfloat16"}
    jobs = [
        job("float32", **plain),
        job("bfloat16", **BFLOAT16),
        {**job("cut", **BFLOAT16), "sigterm_at": 1},
        job("cut", **BFLOAT16),
    ]
    if request.param == "cuda":
        train([job("float32_cpu", **plain), job("packed_cpu", **PACKED)], folder, "cpu")
        jobs += [job("packed", **PACKED), job("kept", **no_recomputation)]
    train(jobs, folder, request.param)
    return folder, request.param


@pytest.mark.slow
class TestRecipe:
    @pytest.mark.parametrize("key", ["loss", "grad_norm"])
    def test_bfloat16_run_that_was_cut_goes_on_as_the_uncut_one(self, key, runs, record_property):
        folder, device = runs
        found = largest_difference(folder, "cut", "bfloat16", key)
        record_property("measured", f"recipe on {device}, bfloat16, cut and resumed: {key}, relative: {found:.1e}")
        assert found <= (1e-6 if device == "cpu" else TIGHT)

    def test_bfloat16_is_near_float32(self, runs):
        folder, _ = runs
        assert largest_difference(folder, "bfloat16", "float32", "loss") <= BF16
        assert largest_difference(folder, "bfloat16", "float32", "grad_norm") <= BF16


@pytest.mark.gpu
@pytest.mark.parametrize("runs", ["cuda"], indirect=True)
@pytest.mark.parametrize("key", ["loss", "grad_norm"])
class TestRecipeOnCuda:
    @pytest.mark.parametrize("name", ["float32", "packed"])
    def test_float32_is_that_of_a_cpu(self, name, key, runs, record_property):
        found = largest_difference(runs[0], name, f"{name}_cpu", key)
        record_property("measured", f"recipe, {name}: {key} on cuda against cpu, relative: {found:.1e}")
        assert found <= TF32

    def test_recomputed_activations_change_no_number(self, key, runs):
        assert largest_difference(runs[0], "bfloat16", "kept", key) <= TIGHT


def make_step(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Any, Callable[[], torch.Tensor]]:
    """A tiny model, and a forward and backward of the recipe's loss on two packed samples with images."""
    import train_step
    from _models import on_device

    words = [
        "--shape",
        "tiny",
        "--prompt-tokens",
        "70",
        "--image-tokens",
        "16",
        "--rows",
        "512",
        "--sample-tokens",
        "250",
    ]
    args = train_step.parse_args([*words, "--device", device.type, "--dtype", str(dtype).removeprefix("torch.")])
    (case,) = train_step.make_cases(args)
    config = train_step.bard_config("tiny", case.block_size)
    model = train_step.build_model(args, config)
    model.set_attn_implementation("bard")
    model.config.block_size = case.block_size
    (batch,) = train_step.make_batches(args, config, case, "packed", tile=128)
    objective = train_step.PBMObjective(train_step.BlockDiffusionCrossEntropy())
    moved = on_device(batch, device, dtype)

    def step() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        loss, _ = train_step.batch_loss(model, model.config, objective, moved)
        loss.backward()
        return loss.detach()

    return model, step


@pytest.fixture
def one_rank(device) -> Iterator[None]:
    """A process group of this process alone: nccl on a GPU, gloo on a CPU."""
    store = dist.HashStore()
    if device.type == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def full_gradients(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).detach().clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def test_fsdp2_on_one_device_gives_loss_and_gradients_of_no_fsdp(device, one_rank, record_property):
    """float32 exactly (but for the order of sums), then with the recipe's policy for bfloat16."""
    model, step = make_step(device)
    expected_loss, expected = step(), full_gradients(model)
    for compute in (torch.float32, torch.bfloat16):
        model, step = make_step(device)
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
        mesh = init_device_mesh(device.type, (1,))
        for layer in (*model.model.language_model.layers, *model.model.visual.blocks):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        loss, gradients = step(), full_gradients(model)
        assert gradients.keys() == expected.keys()
        total = torch.stack([g.double().norm() for g in expected.values()]).norm()
        off = torch.stack([(gradients[n].double() - g.double()).norm() for n, g in expected.items()]).norm() / total
        record_property("measured", f"FSDP2 on {device}, {compute}: gradients off by {off:.1e} of their norm")
        exact = compute == torch.float32
        assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5 if exact else BF16)
        assert float(off) <= (1e-4 if exact else BF16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_host_does_not_wait_in_a_microbatch(dtype, cuda):
    """Forward and backward of a packed row with images; PyTorch raises where the host would wait."""
    _, step = make_step(cuda, dtype)
    step()  # compiles
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()
