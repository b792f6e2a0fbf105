"""Chunked losses equal those of full logits, and no tensor of the size of the logits ever exists."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_bard.method.chunked import OutputHead, chunked_loss, chunked_top_k
from nemo_bard.method.losses import BlockDiffusionCrossEntropy, MixturePathKL, top_k_kd

TOKENS, HIDDEN, VOCABULARY = 37, 24, 1001


class LargestTensor(TorchDispatchMode):
    """Most elements of any tensor that an operation makes, and all shapes."""

    def __init__(self):
        super().__init__()
        self.elements, self.shapes = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
                self.shapes.add(tuple(leaf.shape))
        return out


def inputs(dtype=torch.float32, tokens=TOKENS):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64) / 3
    labels = torch.randint(VOCABULARY, (tokens,), generator=generator)
    noisy_ids = torch.where(torch.rand(tokens, generator=generator) < 0.5, labels, labels.roll(1))
    token_weight = torch.rand(tokens, generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels, noisy_ids, token_weight


def full_and_chunked(function, hidden, weight, chunk_tokens):
    """Loss and both gradients, from full logits and in chunks."""
    full = function(hidden @ weight.T, slice(None))
    expected = (full, *torch.autograd.grad(3 * full, (hidden, weight)))
    loss = chunked_loss(hidden, weight, function, chunk_tokens=chunk_tokens)
    return expected, (loss, *torch.autograd.grad(3 * loss, (hidden, weight)))


@pytest.mark.parametrize("chunk_tokens", [1, 8, 37, 1000])
@pytest.mark.parametrize("kind", [BlockDiffusionCrossEntropy, MixturePathKL])
def test_losses_equal_full_logits(kind, chunk_tokens):
    hidden, weight, labels, noisy_ids, token_weight = inputs()
    loss_fn = kind(reduction="sum")

    def function(logits, part):
        return loss_fn(logits, labels[part], weight=token_weight[part], noisy_ids=noisy_ids[part])

    for full, chunked in zip(*full_and_chunked(function, hidden, weight, chunk_tokens), strict=True):
        torch.testing.assert_close(chunked, full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_distillation_equals_full_logits(direction):
    hidden, weight, *_ = inputs()
    anchor, anchor_weight = torch.randn(TOKENS, 16), torch.randn(VOCABULARY, 16)
    logits, ids = chunked_top_k(anchor, anchor_weight, k=5, chunk_tokens=4)
    expected = (anchor @ anchor_weight.T).topk(5)
    torch.testing.assert_close(logits, expected.values, rtol=1e-5, atol=1e-5)
    assert torch.equal(ids, expected.indices)

    def function(logits_cv, part):
        return top_k_kd(logits_cv, logits[part], ids[part], temperature=2.0, direction=direction).sum()

    for full, chunked in zip(*full_and_chunked(function, hidden, weight, 5), strict=True):
        torch.testing.assert_close(chunked, full, rtol=1e-5, atol=1e-5)


def test_float64_stays_float64():
    hidden, weight, labels, _, token_weight = inputs(torch.float64)
    loss_fn = BlockDiffusionCrossEntropy()
    function = lambda logits, part: loss_fn(logits, labels[part], weight=token_weight[part])  # noqa: E731
    for full, chunked in zip(*full_and_chunked(function, hidden, weight, 8), strict=True):
        assert chunked.dtype == torch.float64
        torch.testing.assert_close(chunked, full, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("train", [True, False])
def test_no_tensor_of_the_size_of_the_logits_exists(train):
    hidden, weight, labels, _, token_weight = inputs()
    chunk, loss_fn, parts = 4, BlockDiffusionCrossEntropy(), []

    def function(logits, part):
        parts.append(part)
        return loss_fn(logits, labels[part], weight=token_weight[part])

    with LargestTensor() as largest, torch.set_grad_enabled(train):
        loss = chunked_loss(hidden, weight, function, chunk_tokens=chunk)
        if train:
            loss.backward()
        chunked_top_k(hidden, weight, k=3, chunk_tokens=chunk)
    # the weight and its gradient are the largest: chunk < HIDDEN < TOKENS
    assert chunk * VOCABULARY <= largest.elements <= HIDDEN * VOCABULARY < TOKENS * VOCABULARY
    assert [index for part in parts for index in range(TOKENS)[part]] == list(range(TOKENS))
    assert all(part.stop - part.start <= chunk for part in parts)
    with LargestTensor() as full:
        loss_fn(hidden @ weight.T, labels, weight=token_weight).backward()
    assert full.elements == TOKENS * VOCABULARY, "the probe sees full logits where there are any"


def test_no_supervised_token_gives_a_connected_zero():
    hidden, weight, *_ = inputs(tokens=0)
    loss = chunked_loss(hidden, weight, lambda logits, part: logits.sum(), chunk_tokens=8)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad.shape == (0, HIDDEN)
    assert weight.grad.abs().max() == 0.0
    values, ids = chunked_top_k(hidden, weight, k=3, chunk_tokens=8)
    assert values.shape == ids.shape == (0, 3)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_inputs_get_no_gradient(frozen):
    hidden, weight, labels, _, token_weight = inputs()
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    loss_fn = BlockDiffusionCrossEntropy()
    function = lambda logits, part: loss_fn(logits, labels[part], weight=token_weight[part])  # noqa: E731
    chunked_loss(hidden, weight, function, chunk_tokens=8).backward()
    assert (hidden.grad is None, weight.grad is None) == (frozen == "hidden", frozen == "weight")


def test_autocast_computes_in_its_dtype_and_keeps_float32_sums():
    hidden, weight, labels, _, token_weight = inputs()
    loss_fn, seen = BlockDiffusionCrossEntropy(), set()

    def function(logits, part):
        seen.add(logits.dtype)
        return loss_fn(logits, labels[part], weight=token_weight[part])

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_loss(hidden, weight, function, chunk_tokens=8)
        full = loss_fn(torch.nn.functional.linear(hidden, weight), labels, weight=token_weight)
    assert seen == {torch.bfloat16}
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, full, rtol=1e-5, atol=1e-5)
    for chunked, expected in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (loss, full)), strict=True):
        assert chunked.dtype == torch.float32
        # full logits accumulate in bfloat16's matmul once, chunks in float32 over several: 8 bits of mantissa
        torch.testing.assert_close(chunked, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


def test_second_backward_is_refused():
    hidden, weight, *_ = inputs()
    loss = chunked_loss(hidden, weight, lambda logits, part: logits.square().sum(), chunk_tokens=8)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_bad_settings():
    hidden, weight, *_ = inputs()
    for value in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="loss_chunk_tokens must be an integer >= 1"):
            chunked_loss(hidden, weight, lambda logits, part: logits.sum(), chunk_tokens=value)
    for k in (0, VOCABULARY + 1):
        with pytest.raises(ValueError, match=f"kd_top_k must be 1 to {VOCABULARY}"):
            chunked_top_k(hidden, weight, k=k, chunk_tokens=8)


def test_head_is_a_linear_layer_or_runs_a_function():
    head = OutputHead(HIDDEN, VOCABULARY, bias=False)
    hidden = torch.randn(2, 3, HIDDEN)
    assert torch.equal(head(hidden), hidden @ head.weight.T)
    assert head(hidden, lambda states, weight: (states.shape, weight is head.weight)) == (hidden.shape, True)


@pytest.mark.parametrize("name", ["tiny_tied", "tiny_untied"])
def test_model_gives_the_gradients_of_full_logits(golden_dir, name):
    from nemo_bard import BardVLForConditionalGeneration

    model = BardVLForConditionalGeneration.from_pretrained(golden_dir / "models" / name)
    ids = torch.arange(2 * 12).view(2, 12) + 5
    call = {
        "input_ids": ids,
        "attention_mask": torch.ones(2, 1, 12, 12, dtype=torch.bool),
        "position_ids": torch.arange(12).expand(3, 2, 12),
        "output_positions": torch.tensor([0, 3, 4, 9, 13, 17, 22]),
        "use_cache": False,
    }
    labels, weight, loss_fn = torch.arange(7), torch.rand(7), BlockDiffusionCrossEntropy()

    def function(logits, part):
        return loss_fn(logits, labels[part], weight=weight[part])

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with LargestTensor() as everything:
        full = loss_fn(model(**call).logits, labels, weight=weight)
    with LargestTensor() as probe:
        chunked = model(**call, output_fn=lambda h, w: chunked_loss(h, w, function, chunk_tokens=3))
        values, _ = model(**call, output_fn=lambda h, w: chunked_top_k(h, w, k=4, chunk_tokens=3))
    size, width = model.config.text_config.vocab_size, model.config.text_config.hidden_size
    rows = lambda shapes: {math.prod(shape[:-1]) for shape in shapes if shape and shape[-1] == size}  # noqa: E731
    assert 7 in rows(everything.shapes)
    assert rows(probe.shapes) <= {2, 3, width}, "chunks of 2, 2 and 3 tokens, and the transposed weight"
    torch.testing.assert_close(values, model(**call).logits.topk(4).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(chunked, full, rtol=1e-5, atol=0)
    expected, found = gradients(full), gradients(chunked)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))
