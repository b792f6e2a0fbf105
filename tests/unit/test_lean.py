"""Lean norms and MLPs: the numbers of transformers' modules, from fewer kept tensors."""

import pytest
import torch
from transformers import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextMLP, Qwen3VLTextRMSNorm

from nemo_bard.model.lean import slim


def pair(kind):
    torch.manual_seed(0)
    if kind is Qwen3VLTextRMSNorm:
        plain = kind(24)
        torch.nn.init.normal_(plain.weight)
    else:
        plain = kind(Qwen3VLTextConfig(hidden_size=24, intermediate_size=40))
    lean = torch.nn.ModuleList([kind(24) if kind is Qwen3VLTextRMSNorm else kind(plain.config)])
    lean[0].load_state_dict(plain.state_dict())
    slim(lean, Qwen3VLTextRMSNorm, Qwen3VLTextMLP)
    assert type(lean[0]) is not kind
    assert isinstance(lean[0], kind)
    return plain, lean[0]


def run(module, x, **autocast):
    module.zero_grad()
    x = x.clone().requires_grad_()
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", **autocast):
        out = module(x)
    (out.float() * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
    return out.detach(), [x.grad, *(p.grad for p in module.parameters())], sum(kept.values())


@pytest.mark.parametrize("kind", [Qwen3VLTextRMSNorm, Qwen3VLTextMLP])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"])
def test_forward_is_equal_and_gradients_to_rounding(kind, dtype):
    plain, lean = pair(kind)
    x = torch.randn(3, 50, 24)
    autocast = {"enabled": dtype == "autocast", "dtype": torch.bfloat16}
    if dtype is torch.bfloat16:
        plain, lean, x = plain.to(dtype), lean.to(dtype), x.to(dtype)
    expected, found = run(plain, x, **autocast), run(lean, x, **autocast)
    assert torch.equal(expected[0], found[0])
    # bfloat16 products and sums round in another order: 8 bits of mantissa
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    for a, b in zip(expected[1], found[1], strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance * float(a.abs().max()))
    assert found[2] < expected[2]
    with torch.no_grad():
        assert torch.equal(plain(x), lean(x))


def test_frozen_weights_get_no_gradient():
    for kind in (Qwen3VLTextRMSNorm, Qwen3VLTextMLP):
        plain, lean = pair(kind)
        x = torch.randn(2, 5, 24)
        expected = run(plain, x)[1][0]
        found = run(lean.requires_grad_(False), x)[1]
        torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)
        assert all(grad is None for grad in found[1:])


def test_an_mlp_whose_last_layer_was_replaced_runs_as_it_was():
    plain, lean = pair(Qwen3VLTextMLP)

    class Other(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    lean.down_proj.__class__ = Other
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(lean(x), plain(x) + 1)


def test_the_model_has_them_in_its_text_layers(golden_model):
    model = golden_model("tiny_untied")
    layer = model.model.language_model.layers[0]
    for module in (layer.mlp, layer.input_layernorm, layer.self_attn.q_norm, model.model.language_model.norm):
        assert "Lean" in type(module).__mro__[1].__name__


def test_models_share_the_classes():
    """A guard on the class of a module holds for the next model, too."""
    for kind in (Qwen3VLTextRMSNorm, Qwen3VLTextMLP):
        assert type(pair(kind)[1]) is type(pair(kind)[1])
