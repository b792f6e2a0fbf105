"""Products of decoding on a CPU: the same numbers as torch's linear layers, in a view of the model alone."""

from __future__ import annotations

import pytest
import torch
from golden_data import GOLDEN
from torch import nn
from torch.nn.functional import linear

from nemo_bard.generation.products import FEWEST_ROWS, MOST_ROWS, TURNED, TurnedHead, TurnedLinear, turned_linear
from nemo_bard.method.chunked import OutputHead
from nemo_bard.upstream.views import view


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 8, 15, 16, 17, 32, 33, 100, 320, 321])
@pytest.mark.parametrize("with_bias", [False, True])
def test_turned_product_is_the_product(rows, with_bias):
    g = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, 24, generator=g), torch.randn(40, 24, generator=g)
    bias = torch.randn(40, generator=g) if with_bias else None
    out = turned_linear(x, weight, bias)
    assert out.is_contiguous()
    # sums of 24 products in float32, perhaps in another order
    torch.testing.assert_close(out, linear(x, weight, bias), rtol=1e-5, atol=1e-5)


def test_turned_product_keeps_leading_dimensions_and_strided_input():
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 24, 7, generator=g).transpose(1, 2), torch.randn(5, 24, generator=g)
    torch.testing.assert_close(turned_linear(x, weight), linear(x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="the product is turned for MKL alone")
@pytest.mark.parametrize(
    ("rows", "dtype", "autocast", "turned"),
    [
        (FEWEST_ROWS, torch.float32, False, True),
        (MOST_ROWS, torch.float32, False, True),
        (FEWEST_ROWS - 1, torch.float32, False, False),
        (MOST_ROWS + 1, torch.float32, False, False),
        (8, torch.float64, False, False),
        (8, torch.bfloat16, False, False),
        (8, torch.float32, True, False),
    ],
)
def test_product_is_turned_where_it_is_faster(rows, dtype, autocast, turned):
    from torch.profiler import profile

    x, weight = torch.ones(rows, 24, dtype=dtype), torch.ones(40, 24, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), profile() as calls:
        turned_linear(x, weight)
    assert ("aten::linear" not in {event.key for event in calls.key_averages()}) == turned


def test_view_has_turned_layers_and_the_model_keeps_its_own():
    from nemo_bard import BardVLForConditionalGeneration

    class Other(nn.Linear):
        pass

    model = BardVLForConditionalGeneration.from_pretrained(GOLDEN / "models/tiny_untied").eval()
    mlp = model.model.language_model.layers[0].mlp
    mlp.up_proj.__class__ = Other  # a class of somebody else's stays what it is
    called = []
    mlp.gate_proj.register_forward_hook(lambda *_: called.append(1))
    seen = view(model, "sdpa", classes=TURNED)
    twin = seen.model.language_model.layers[0].mlp
    assert type(twin.gate_proj) is TurnedLinear
    assert type(twin.up_proj) is Other
    assert type(seen.lm_head) is TurnedHead
    assert twin.gate_proj.weight is mlp.gate_proj.weight
    assert type(mlp.gate_proj) is nn.Linear
    assert type(model.lm_head) is OutputHead
    x = torch.randn(8, mlp.gate_proj.in_features)
    torch.testing.assert_close(twin(x), mlp(x), rtol=1e-5, atol=1e-5)
    assert called == [1, 1]


@pytest.mark.parametrize(("path", "turned"), [("fast", True), ("plain", False)])
def test_the_fast_engine_turns_products_and_the_oracle_does_not(path, turned, monkeypatch):
    from nemo_bard import BardVLForConditionalGeneration

    seen = set()
    own = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: (seen.add("torch"), own(self, x))[1])
    monkeypatch.setattr(TurnedLinear, "forward", lambda self, x: (seen.add("turned"), own(self, x))[1])
    model = BardVLForConditionalGeneration.from_pretrained(GOLDEN / "models/tiny_untied").eval()
    model.generate(
        torch.tensor([[5, 6, 7, 8]]),
        max_new_tokens=8,
        block_size=8,
        mask_token_id=509,
        eos_token_id=-1,
        decode_path=path,
    )
    assert seen == {"turned" if turned else "torch"}


def test_head_still_hands_its_weight_to_a_function():
    head = TurnedHead(8, 5, bias=False)
    x = torch.randn(6, 8)
    assert head(x, lambda hidden, weight: (hidden is x, weight is head.weight)) == (True, True)
