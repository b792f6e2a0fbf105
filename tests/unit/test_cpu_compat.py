import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from nemo_bard.upstream.cpu import apply, normalise_device


@pytest.mark.parametrize(
    ("device", "expected"),
    [(None, torch.device("cpu")), (1, torch.device("cuda", 1)), (torch.device("cuda", 0), torch.device("cuda", 0))],
)
def test_device_becomes_a_torch_device(device, expected):
    dist_env = SimpleNamespace(device=device)
    normalise_device(dist_env)
    assert dist_env.device == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="does nothing where CUDA exists")
def test_upstream_still_has_what_is_replaced_and_applying_twice_changes_nothing():
    import nemo_automodel._transformers.auto_model as auto_model
    import nemo_automodel.recipes.vlm.finetune as finetune

    apply()
    replaced = (auto_model.apply_model_infrastructure, finetune.initialize_distributed, finetune.calculate_loss)
    assert all(hasattr(function, "__wrapped__") for function in replaced)
    assert not any(hasattr(function.__wrapped__, "__wrapped__") for function in replaced)
    apply()
    assert replaced == (
        auto_model.apply_model_infrastructure,
        finetune.initialize_distributed,
        finetune.calculate_loss,
    )
    assert torch.cuda.current_device() == 0
    assert torch.cuda.reset_peak_memory_stats() is None
    labels = torch.tensor([[0, 1, 2]])[:, 1:].expand(2, 2)
    loss = finetune.calculate_loss(
        finetune.MaskedCrossEntropy(), logits=torch.zeros(2, 2, 4), labels=labels, num_label_tokens=4
    )
    assert loss.item() == pytest.approx(torch.tensor(4.0).log().item())


FREE_AND_MEASURE = """
import gc
from pathlib import Path

import torch

from nemo_bard.upstream.cpu import apply


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


apply()
for _ in range(2):  # the first round is what raises glibc's limit by default
    gc.collect()
    before = resident()
    freed, stay = [], []
    for _ in range(60):
        freed.append(torch.ones(2**20))
        stay.append(torch.ones(2**12))
    held = resident() - before
    freed.clear()
    assert resident() - before < held - 50 * 2**22, "of 60 blocks of 4 MiB"
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="does nothing where CUDA exists")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
def test_freed_memory_goes_back_to_the_system():
    """Blocks between others that stay: without the setting they remain in the heap. In a process without a past."""
    done = subprocess.run([sys.executable, "-c", FREE_AND_MEASURE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
