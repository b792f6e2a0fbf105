"""Decoding with tensors that say ``cuda``: who waits for whom, what is captured, and that ids are the oracle's."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from golden_data import GOLDEN, case_name, golden_arrays, golden_cases
from pretend_cuda import PretendCuda, to_cuda

CASES = {case_name(case): case for case in golden_cases("generate")}
CHOSEN = ("static_b8_s3_text", "dynamic_b8_t0.9_text", "dynamic_b4_t0.9_image", "dynamic_b32_s16_t0.9_image")
FLAGS = "generation/graph.py"


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch):
    """Compilers see no values; the kernels run as they are, and a pool keeps nothing from test to test."""
    from nemo_bard.generation import session
    from nemo_bard.generation.kernels import Kernels

    monkeypatch.setattr(Kernels, "compiled", classmethod(lambda cls: cls()))
    monkeypatch.setattr(session, "POOL", session.Pool())


def prompt_of(case):
    arrays = golden_arrays("generate", case["file"])
    return {name: arrays[name] for name in ("input_ids", "pixel_values", "image_grid_thw") if name in arrays}


def load(case, dtype=torch.float32):
    from nemo_bard import BardVLForConditionalGeneration

    return BardVLForConditionalGeneration.from_pretrained(GOLDEN / "models" / case["model"], dtype=dtype).eval()


@pytest.mark.parametrize("name", CHOSEN)
def test_the_host_looks_once_in_four_steps(name):
    from nemo_bard.generation.graph import FLAG_STEPS

    case = CASES[name]
    model, prompt = load(case), prompt_of(case)
    expected = model.generate(prompt, return_dict_in_generate=True, **case["settings"])
    steps = int(expected.block_step_counts.sum())
    with PretendCuda() as log:
        to_cuda(model)
        replays = []
        for _ in range(2):
            log.reset()
            ids = model.generate(prompt, **case["settings"])
            waits = Counter("flag" if FLAGS in sync.where else sync.where for sync in log.syncs)
            assert waits.pop("flag") <= steps / FLAG_STEPS + 3, waits  # one past the end, two to read the response
            assert not waits  # nothing else in the whole call, prompt and vision tower included
            assert not log.mismatches
            assert ids.cpu().tolist() == expected.sequences.tolist()
            replays.append(log.operations["graph replay"])
    assert steps - 1 <= replays[0] == replays[1] < steps + FLAG_STEPS


@pytest.mark.parametrize("wide", [False, True])
def test_a_step_always_does_the_same(wide, monkeypatch):
    """The same operations, and allocations of the same sizes, whatever the state; so a graph holds all there is."""
    from nemo_bard.generation import runner

    case = CASES["static_b8_s3_text"]
    model, found = load(case), []

    class Watched(runner.Captured):
        def __init__(self, run, state, **kwargs):
            super().__init__(run, state, **{**kwargs, "enabled": False})
            self.wide = run.args[0]

        def __call__(self):
            log = PretendCuda.active()
            log.reset()
            super().__call__()
            assert not log.syncs
            if self.wide == wide:
                found.append((dict(log.operations), list(log.allocations)))

    monkeypatch.setattr(runner, "Captured", Watched)
    with PretendCuda():
        model.generate(prompt_of(case) if to_cuda(model) is model else None, **case["settings"])
    assert len(found) > 2
    assert all(step == found[0] for step in found)


@pytest.mark.parametrize("context_attention", ["block", "causal"])
def test_in_bfloat16_all_attention_is_that_of_sequences(context_attention):
    """Prompt and steps take the kernel; no mask of queries by keys is made."""
    case = CASES["dynamic_b4_t0.9_image"]
    model, prompt = load(case, torch.bfloat16), prompt_of(case)
    model.config.context_attention = context_attention
    settings = {**case["settings"], "compile_step": False, "cache_implementation": "static"}
    with PretendCuda() as log:
        to_cuda(model)
        model.generate(prompt, **settings)  # tries the kernel
        log.reset()
        output = model.generate(prompt, return_dict_in_generate=True, **settings)
        layers = model.config.text_config.num_hidden_layers
        calls = {"block": 1, "causal": 2}[context_attention] * layers * output.forwards
        assert log.operations["_varlen_attn"] == calls + model.config.vision_config.depth
        assert not any("scaled_dot_product" in name for name in log.operations)
        assert output.sequences.shape == (1, case["settings"]["max_new_tokens"])


def test_the_kernel_is_not_used_where_it_is_wrong(monkeypatch, caplog):
    from nemo_bard.generation import prefix

    prefix.has_kernel.cache_clear()
    device = torch.device("cuda", 0)
    with PretendCuda():
        assert prefix.has_kernel(device, torch.bfloat16, 4, 2, 16)
        assert not prefix.has_kernel(device, torch.float32, 4, 2, 16)
        assert not prefix.has_kernel(torch.device("cpu"), torch.bfloat16, 4, 2, 16)
        real = torch.nn.attention.varlen.varlen_attn
        monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", lambda *a, **k: real(*a, **k) + 0.1)
        monkeypatch.setattr(prefix, "KERNEL_ARGUMENTS", ())
        assert not prefix.has_kernel(device, torch.bfloat16, 8, 2, 16)
        assert "varlen_attn is off by 0.1" in caplog.text
        monkeypatch.setattr(prefix, "KERNEL_ARGUMENTS", ("seqused_k", "speed"))
        assert not prefix.has_kernel(device, torch.bfloat16, 8, 4, 16)
        assert "has no seqused_k and no speed" in caplog.text
    prefix.has_kernel.cache_clear()
