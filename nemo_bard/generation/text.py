"""The language model of a denoising step: a fixed number of tokens per row against a cache, hidden states out.

``ModuleText`` calls the modules of the model, whatever they are. ``FusedText`` computes the same with one product for queries,
keys and values, one for the two halves of an MLP, and few small kernels in between; it is for models as transformers builds
them, without adapters, quantisation or hooks.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLTextAttention,
    Qwen3VLTextDecoderLayer,
    Qwen3VLTextMLP,
    Qwen3VLTextModel,
    Qwen3VLTextRMSNorm,
)

from nemo_bard.generation.kernels import Kernels
from nemo_bard.generation.prefix import Prefix, PrefixCache, PrefixCacheLayer, attend
from nemo_bard.upstream.torch import has_hooks, join_weights, own_weight


class TextModel(Protocol):
    """Runs the language model on tokens whose keys and values go into a cache."""

    def __call__(self, ids: Tensor, positions: Tensor, cache: PrefixCache, prefix: Prefix, keep: int) -> Tensor:
        """Hidden states behind the last norm.

        Args:
            ids: ``[N, Q]`` int64.
            positions: M-RoPE positions, ``[3, N, Q]`` int64.
            cache: Where keys and values go.
            prefix: Where to in it, and what the queries see.
            keep: How many of the last tokens of each row are wanted.

        Returns:
            ``[N, keep, H]``.
        """
        ...


class ModuleText:
    """Calls the modules of the model.

    Args:
        text: transformers' language model, with the attention backend ``prefix.NAME``.
    """

    def __init__(self, text: Any) -> None:
        self.text = text

    def __call__(self, ids: Tensor, positions: Tensor, cache: PrefixCache, prefix: Prefix, keep: int) -> Tensor:
        """See ``TextModel``."""
        cache.prefix = prefix
        embedded = self.text.get_input_embeddings()(ids)
        hidden = self.text(inputs_embeds=embedded, position_ids=positions, past_key_values=cache, prefix=prefix)
        return hidden.last_hidden_state[:, -keep:]


class FusedText:
    """Computes what the modules would.

    The weights that are joined become parts of one tensor each, so that memory does not grow; parameters stay the objects
    that they are.

    Args:
        text: transformers' language model; see ``can_fuse``.
        kernels: The small operations between the products.
    """

    def __init__(self, text: Any, kernels: Kernels) -> None:
        self.text, self.kernels = text, kernels
        self.joined = [
            (
                join_weights(attention.q_proj, attention.k_proj, attention.v_proj),
                join_weights(layer.mlp.gate_proj, layer.mlp.up_proj),
            )
            for layer in text.layers
            for attention in [layer.self_attn]
        ]

    def __call__(self, ids: Tensor, positions: Tensor, cache: PrefixCache, prefix: Prefix, keep: int) -> Tensor:
        """See ``TextModel``."""
        text, kernels = self.text, self.kernels
        embedded = text.embed_tokens(ids)
        cos, sin = (angle.flatten(0, 1) for angle in text.rotary_emb(embedded, positions))
        hidden = embedded.flatten(0, 1)
        norms = [layer.input_layernorm for layer in text.layers] + [text.norm]
        normed = kernels.norm(hidden, norms[0].weight, norms[0].variance_epsilon)
        for index, (layer, (qkv, gate_up)) in enumerate(zip(text.layers, self.joined, strict=True)):
            attention, stored = layer.self_attn, cache.layers[index]
            assert isinstance(stored, PrefixCacheLayer)
            query, key, value = kernels.rotate(
                linear(normed, qkv),
                attention.q_norm.weight,
                attention.k_norm.weight,
                attention.q_norm.variance_epsilon,
                cos,
                sin,
                attention.num_key_value_groups,
            )
            keys, values = stored.write(prefix.slots, key, value)
            seen = attend(query, keys, values, prefix, attention.scaling)
            after = layer.post_attention_layernorm
            hidden, normed = kernels.add_norm(
                hidden, attention.o_proj(seen.flatten(1)), after.weight, after.variance_epsilon
            )
            update = layer.mlp.down_proj(kernels.gate(linear(normed, gate_up)))
            following = norms[index + 1]
            hidden, normed = kernels.add_norm(hidden, update, following.weight, following.variance_epsilon)
        return normed.unflatten(0, ids.shape)[:, -keep:]


def can_fuse(text: Any) -> bool:
    """Whether a language model is as transformers builds it: its own classes, plain weights, no hooks, no bias."""
    if not isinstance(text, Qwen3VLTextModel) or text.config.hidden_act != "silu" or has_hooks(text):
        return False
    return all(
        isinstance(layer, Qwen3VLTextDecoderLayer)
        and isinstance(layer.self_attn, Qwen3VLTextAttention)
        and isinstance(layer.mlp, Qwen3VLTextMLP)
        and all(own_weight(linear) for linear in _projections(layer))
        and all(isinstance(norm, Qwen3VLTextRMSNorm) for norm in _norms(layer))
        for layer in text.layers
    ) and isinstance(text.norm, Qwen3VLTextRMSNorm)


def _projections(layer: Any) -> list[nn.Module]:
    attention, mlp = layer.self_attn, layer.mlp
    return [
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.o_proj,
        mlp.gate_proj,
        mlp.up_proj,
        mlp.down_proj,
    ]


def _norms(layer: Any) -> list[nn.Module]:
    attention = layer.self_attn
    return [attention.q_norm, attention.k_norm, layer.input_layernorm, layer.post_attention_layernorm]
