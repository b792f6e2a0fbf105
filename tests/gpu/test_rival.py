"""The rival of the decoding benchmark: its captured steps give the ids of transformers' own ``generate``."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("rows", [1, 3])
def test_captured_autoregressive_steps_give_the_ids_of_transformers(rows, device):
    from _models import bard_config, image_prompt, on_device, random_model
    from _rival import StaticDecoder, autoregressive, greedy

    config = bard_config("tiny", 8)
    source = autoregressive(random_model(config, device=device, dtype=torch.float32, seed=0).eval())
    for seed in range(2):
        prompt = image_prompt(config, rows=rows, prompt_tokens=40, image_tokens=16, seed=seed)
        batch = on_device(prompt, device, torch.float32)
        decoder = StaticDecoder(source, rows=rows, capacity=64, compiled=False)
        expected = greedy(source, batch, 20)
        assert torch.equal(decoder.generate(batch, 20), expected)
        assert torch.equal(decoder.generate(batch, 7), expected[:, :7])


def test_a_captured_step_makes_the_host_wait_for_nothing():
    """With tensors that pretend to be on CUDA: as many waits for 20 tokens as for 5, and the ids of a CPU."""
    from _models import bard_config, image_prompt, on_device, random_model
    from _rival import StaticDecoder, autoregressive, greedy
    from pretend_cuda import CUDA, PretendCuda, to_cuda

    config = bard_config("tiny", 8)
    source = autoregressive(random_model(config, device=torch.device("cpu"), dtype=torch.float32, seed=0).eval())
    batch = image_prompt(config, rows=2, prompt_tokens=40, image_tokens=0, seed=0)
    expected = greedy(source, batch, 20)
    with PretendCuda() as log:
        to_cuda(source)
        moved = on_device(batch, CUDA, torch.float32)
        decoder = StaticDecoder(source, rows=2, capacity=64, compiled=False)
        waits = []
        for tokens in (20, 5):
            log.reset()
            assert torch.equal(decoder.generate(moved, tokens).cpu(), expected[:, :tokens])
            waits.append(len(log.syncs))
    assert waits[0] == waits[1]
