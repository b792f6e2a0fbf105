from __future__ import annotations

import math

import pytest
import torch

from nemo_bard.method.losses import BlockDiffusionCrossEntropy, MixturePathKL, token_scale, top_k_kd

LOSSES = [BlockDiffusionCrossEntropy, MixturePathKL]


@pytest.fixture
def two_by_four():
    """Two tokens, four ids; probabilities (1/2, 1/4, 1/8, 1/8) and (1/10, 2/10, 3/10, 4/10)."""
    return torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64).log()


def test_cross_entropy_by_hand(two_by_four):
    """``-w_0 log(1/4) - w_1 log(4/10)``; adding a constant to a token's logits changes nothing."""
    loss = BlockDiffusionCrossEntropy()
    weight = torch.tensor([2.0, 0.5])
    value = loss(two_by_four + torch.tensor([[3.0], [-5.0]]), torch.tensor([1, 3]), weight=weight)
    assert value.item() == pytest.approx(2 * math.log(4) + 0.5 * math.log(2.5), rel=1e-12)


def test_mixture_path_kl_by_hand(two_by_four):
    """Token 0 is noisy (2 for 1): ``-(1/8 + log(1/4))``; token 1 is clean (3): ``-(4/10 - 1)``."""
    loss = MixturePathKL()
    value = loss(two_by_four, torch.tensor([1, 3]), weight=torch.tensor([2.0, 0.5]), noisy_ids=torch.tensor([2, 3]))
    assert value.item() == pytest.approx(2 * (math.log(4) - 0.125) + 0.5 * 0.6, rel=1e-12)


def test_mixture_path_kl_is_least_at_the_posterior():
    """Of all distributions over two ids, the expected loss is least at the one the tokens are drawn from.

    With the noisy token ``x`` fixed and the clean token ``c`` equal to it with probability ``q``, the expected loss is
    ``-(p(x) - q + (1 - q) log p(not x))``, whose derivative vanishes at ``p(x) = q``.
    """
    q = 0.3
    p = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    logits = torch.stack([p, 1 - p], -1).log()
    noisy = torch.zeros(99, dtype=torch.int64)
    loss = MixturePathKL()
    expected = q * loss.per_token(logits, noisy, noisy) + (1 - q) * loss.per_token(logits, 1 - noisy, noisy)
    assert p[expected.argmin()] == pytest.approx(q)


@pytest.mark.parametrize("loss_class", LOSSES)
class TestEveryLoss:
    @pytest.fixture
    def batch(self):
        """Four responses of different lengths; the first two tokens belong to none."""
        g = torch.Generator().manual_seed(0)
        response_ids = torch.tensor([-1, -1, *[0] * 4, *[1] * 8, *[2] * 4, *[3] * 12])
        size = response_ids.numel()
        return {
            "logits": torch.randn(size, 11, generator=g),
            "labels": torch.randint(11, (size,), generator=g),
            "noisy": torch.randint(11, (size,), generator=g),
            "response": response_ids,
            "loss_mask": (torch.rand(size, generator=g) < 0.6) & (response_ids >= 0),
            "loss_weight": 1 / torch.rand(size, generator=g).clamp_min(0.1),
        }

    def gradient(self, loss_class, reduction, batch, parts):
        """Gradient of the summed losses of ``parts`` (sets of responses), each with the totals of the whole step."""
        logits = batch["logits"].clone().requires_grad_()
        total = 0.0
        for part in parts:
            keep = torch.isin(batch["response"], torch.tensor([-1, *part]))
            scale = token_scale(
                reduction, batch["response"][keep], num_samples=4, num_loss_tokens=int(batch["loss_mask"].sum())
            )
            chosen = batch["loss_mask"][keep]
            total = total + loss_class(reduction)(
                logits[keep][chosen],
                batch["labels"][keep][chosen],
                weight=(scale * batch["loss_weight"][keep])[chosen],
                noisy_ids=batch["noisy"][keep][chosen],
            )
        total.backward()
        return total.detach(), logits.grad

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("parts", [[[0], [1], [2], [3]], [[0, 3], [1, 2]], [[2], [], [0, 1, 3]]])
    def test_gradients_ignore_how_a_batch_is_split(self, loss_class, reduction, parts, batch):
        whole_value, whole = self.gradient(loss_class, reduction, batch, [[0, 1, 2, 3]])
        value, split = self.gradient(loss_class, reduction, batch, parts)
        torch.testing.assert_close(value, whole_value, rtol=1e-5, atol=0)
        torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-8)
        assert whole[batch["loss_mask"]].abs().sum(-1).min() > 0

    def test_mean_is_the_average_over_samples_of_averages_over_responses(self, loss_class, batch):
        loss = loss_class("mean")
        per_token = loss.per_token(batch["logits"], batch["labels"], batch["noisy"]) * batch["loss_weight"]
        expected = 0.0
        for response in range(4):
            inside = batch["response"] == response
            expected += (per_token * batch["loss_mask"])[inside].sum() / inside.sum() / 4
        value, _ = self.gradient(loss_class, "mean", batch, [[0, 1, 2, 3]])
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)

    def test_sum_is_the_average_over_supervised_tokens(self, loss_class, batch):
        loss = loss_class("sum")
        per_token = loss.per_token(batch["logits"], batch["labels"], batch["noisy"]) * batch["loss_weight"]
        value, _ = self.gradient(loss_class, "sum", batch, [[0, 1, 2, 3]])
        torch.testing.assert_close(value, per_token[batch["loss_mask"]].mean(), rtol=1e-5, atol=0)

    def test_nothing_supervised_gives_a_zero_with_a_gradient(self, loss_class):
        logits = torch.randn(3, 5, requires_grad=True)
        none = torch.zeros(0, dtype=torch.int64)
        value = loss_class()(logits[:0], none, weight=torch.zeros(0), noisy_ids=none)
        value.backward()
        assert value.item() == 0.0
        assert torch.equal(logits.grad, torch.zeros(3, 5))

    def test_half_precision_logits_are_computed_in_float32(self, loss_class, batch):
        half = batch["logits"].bfloat16()
        ids = {"labels": batch["labels"], "weight": batch["loss_weight"], "noisy_ids": batch["noisy"]}
        value = loss_class()(half, **ids)
        assert value.dtype == torch.float32
        assert torch.equal(value, loss_class()(half.float(), **ids))

    @pytest.mark.parametrize("reduction", ["none", "Mean", None])
    def test_reduction_is_checked(self, loss_class, reduction):
        with pytest.raises(ValueError, match="reduction must be one of mean, sum, got"):
            loss_class(reduction)


def test_mixture_path_kl_needs_noisy_ids():
    with pytest.raises(ValueError, match="MixturePathKL needs noisy_ids"):
        MixturePathKL()(torch.randn(2, 4), torch.tensor([0, 1]), weight=torch.ones(2))
    assert MixturePathKL.path == "uniform"
    assert BlockDiffusionCrossEntropy.path is None


class TestTokenScale:
    def test_mean_counts_padding_and_is_zero_outside(self):
        ids = torch.tensor([[-1, 0, 0, 0, 0], [-1, 1, 1, -1, -1]])
        scale = token_scale("mean", ids, num_samples=5, num_loss_tokens=99)
        expected = torch.tensor([[0, 0.05, 0.05, 0.05, 0.05], [0, 0.1, 0.1, 0, 0]])
        torch.testing.assert_close(scale, expected)

    def test_sum(self):
        ids = torch.tensor([[-1, 0, 0], [-1, 1, -1]])
        scale = token_scale("sum", ids, num_samples=5, num_loss_tokens=8)
        assert torch.equal(scale, torch.tensor([[0, 0.125, 0.125], [0, 0.125, 0]]))

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_totals_may_be_tensors_or_zero(self, reduction):
        ids = torch.tensor([-1, 0, 0])
        numbers = token_scale(reduction, ids, num_samples=3, num_loss_tokens=7)
        tensors = token_scale(reduction, ids, num_samples=torch.tensor(3), num_loss_tokens=torch.tensor(7))
        assert torch.equal(numbers, tensors)
        none = token_scale(reduction, torch.full((3,), -1), num_samples=0, num_loss_tokens=0)
        assert torch.equal(none, torch.zeros(3))

    def test_reduction_is_checked(self):
        with pytest.raises(ValueError, match="reduction must be one of mean, sum, got 'max'"):
            token_scale("max", torch.tensor([0]), num_samples=1, num_loss_tokens=1)


class TestTopKKd:
    def test_forward_by_hand(self, two_by_four):
        """The anchor's top two are ids 0 and 1 with odds 3 : 1."""
        anchor = torch.tensor([[3.0, 1.0]], dtype=torch.float64).log() + 2.0
        value = top_k_kd(two_by_four[:1], anchor, torch.tensor([[0, 1]]))
        assert value.item() == pytest.approx(-(0.75 * math.log(0.5) + 0.25 * math.log(0.25)), rel=1e-12)

    def test_reverse_by_hand(self, two_by_four):
        """The student has odds 2 : 1 on these two."""
        anchor = torch.tensor([[3.0, 1.0]], dtype=torch.float64).log() + 2.0
        value = top_k_kd(two_by_four[:1], anchor, torch.tensor([[0, 1]]), direction="reverse")
        expected = 2 / 3 * math.log((2 / 3) / 0.75) + 1 / 3 * math.log((1 / 3) / 0.25)
        assert value.item() == pytest.approx(expected, rel=1e-12)

    def test_the_temperature_divides_both(self):
        g = torch.Generator().manual_seed(0)
        student, anchor = torch.randn(5, 9, generator=g), torch.randn(5, 3, generator=g)
        ids = torch.randint(9, (5, 3), generator=g)
        for direction in ("forward", "reverse"):
            warm = top_k_kd(student, anchor, ids, temperature=2.0, direction=direction)
            torch.testing.assert_close(warm, top_k_kd(student / 2, anchor / 2, ids, direction=direction))

    def test_equal_models_have_no_reverse_loss_and_the_anchors_entropy_as_forward_loss(self):
        logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
        top, ids = logits.topk(9)
        torch.testing.assert_close(top_k_kd(logits, top, ids, direction="reverse"), torch.zeros(5), rtol=0, atol=1e-6)
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        torch.testing.assert_close(top_k_kd(logits, top, ids), entropy)

    def test_reverse_is_never_negative(self):
        g = torch.Generator().manual_seed(0)
        student, anchor = torch.randn(50, 9, generator=g), torch.randn(50, 3, generator=g)
        ids = torch.stack([torch.randperm(9, generator=g)[:3] for _ in range(50)])
        assert (top_k_kd(student, anchor, ids, direction="reverse") >= -1e-6).all()

    @pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
    def test_temperature_is_checked(self, temperature):
        with pytest.raises(ValueError, match="kd_temperature must be > 0, got"):
            top_k_kd(torch.randn(1, 4), torch.randn(1, 2), torch.tensor([[0, 1]]), temperature=temperature)

    def test_direction_is_checked(self):
        with pytest.raises(ValueError, match="kd_direction must be one of forward, reverse, got 'both'"):
            top_k_kd(torch.randn(1, 4), torch.randn(1, 2), torch.tensor([[0, 1]]), direction="both")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_overwriting_gives_the_same_in_the_logits_memory(dtype):
    """Values and gradients of torch's cross-entropy; large logits must not overflow."""
    torch.manual_seed(0)
    logits, labels = torch.randn(7, 50, dtype=dtype) * 60, torch.randint(0, 50, (7,))
    loss, weight, results = BlockDiffusionCrossEntropy(), torch.rand(7, dtype=dtype), []
    for overwrite in (False, True):
        leaf = logits.clone().requires_grad_()
        own = leaf * 1
        value = loss(own, labels, weight=weight, overwrite=overwrite)
        assert torch.equal(own, logits) is not overwrite
        results.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    # float32: a logit near 200 has an ulp of 1.5e-5
    tolerance = {"rtol": 1e-6, "atol": 3e-5} if dtype is torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(results[1], results[0], **tolerance)


def test_overwriting_leaves_logits_of_half_precision_alone():
    torch.manual_seed(0)
    logits, labels = torch.randn(7, 50).bfloat16(), torch.randint(0, 50, (7,))
    leaf = logits.clone().requires_grad_()
    value = BlockDiffusionCrossEntropy()(leaf, labels, weight=torch.ones(7), overwrite=True)
    (grad,) = torch.autograd.grad(value, leaf)
    assert torch.equal(leaf, logits)
    expected = torch.softmax(logits.float(), -1) - torch.nn.functional.one_hot(labels, 50)
    torch.testing.assert_close(grad, expected.bfloat16())


def test_overwritten_logits_refuse_a_second_backward():
    logits = torch.randn(3, 5, requires_grad=True)
    value = BlockDiffusionCrossEntropy()(logits * 1, torch.tensor([0, 1, 2]), weight=torch.ones(3), overwrite=True)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        value.backward()
