"""The autoregressive source at its best: greedy, a static cache, one step captured as a CUDA graph.

What a token costs is one replay: embedding, text model, LM head, argmax and the books on the device; the host waits once, at
the end. The keys of a group of heads are not repeated (attention backend ``bard``). On a CPU the same step runs uncaptured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, Qwen3VLConfig, Qwen3VLForConditionalGeneration, StaticCache

from nemo_bard import BardVLForConditionalGeneration
from nemo_bard.model.attention import NAME

WARM_UP = 3
"""Steps before a graph is captured: libraries set themselves up."""


def autoregressive(bard: BardVLForConditionalGeneration) -> Qwen3VLForConditionalGeneration:
    """A Qwen3-VL that shares the weights of a BARD model."""
    bard.set_attn_implementation(NAME)
    fields = {k: v for k, v in bard.config.to_dict().items() if k not in ("model_type", "architectures")}
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**fields))
    model.model, model.lm_head = bard.model, bard.lm_head
    return model.eval()


def greedy(model: Qwen3VLForConditionalGeneration, batch: dict[str, Tensor], new_tokens: int, **how: Any) -> Tensor:
    """What transformers' own ``generate`` gives: exactly ``new_tokens`` ids for each row, ``[N, new_tokens]``."""
    ids = model.generate(
        **batch,
        mm_token_type_ids=image_tokens(model, batch),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        **how,
    )
    return ids[:, batch["input_ids"].shape[1] :]


def image_tokens(model: Qwen3VLForConditionalGeneration, batch: dict[str, Tensor]) -> Tensor:
    """1 where a token stands for a piece of an image, ``[N, P]``."""
    return (batch["input_ids"] == model.config.image_token_id).int()


class StaticDecoder:
    """Greedy decoding of prompts of one length, without padding."""

    def __init__(self, model: Qwen3VLForConditionalGeneration, *, rows: int, capacity: int, compiled: bool) -> None:
        """Make cache and books, and capture a step.

        Args:
            model: The autoregressive model.
            rows: Batch size.
            capacity: Most tokens of a row, prompt and response.
            compiled: Whether the kernels of the step are torch.compile's, fused, instead of PyTorch's own.
        """
        self.model = model
        self.kept = [parameter.detach() for parameter in model.parameters()]  # a graph has recorded where they are
        weight, text = model.get_input_embeddings().weight, model.config.text_config
        self.cache = StaticCache(text, max_cache_len=capacity)
        self.cache.early_initialization(rows, text.num_key_value_heads, text.head_dim, weight.dtype, weight.device)
        long = {"dtype": torch.int64, "device": weight.device}
        self.token = torch.zeros(rows, 1, **long)
        self.position = torch.zeros(3, rows, 1, **long)
        self.cursor, self.number = torch.zeros(1, **long), torch.zeros(1, **long)
        self.columns = torch.arange(capacity, **long).view(1, 1, 1, -1)
        self.answer = torch.zeros(rows, capacity, **long)
        self.step = torch.compile(self._step, fullgraph=True, dynamic=False) if compiled else self._step
        if weight.is_cuda:
            self.step = self._capture(self.step)

    def _step(self) -> None:
        """Run the last token, and append the next one."""
        hidden = self.model.model.language_model(
            inputs_embeds=self.model.get_input_embeddings()(self.token),
            attention_mask=(self.columns <= self.cursor).expand(len(self.token), -1, -1, -1),
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        self.token.copy_(self.model.lm_head(hidden).argmax(-1))
        self.answer.index_copy_(1, self.number, self.token)
        for book in (self.position, self.cursor, self.number):
            book.add_(1)

    @torch.no_grad()
    def _capture(self, step: Any) -> Any:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    @torch.no_grad()
    def generate(self, batch: dict[str, Tensor], new_tokens: int) -> Tensor:
        """``new_tokens`` greedy ids for each row, ``[N, new_tokens]``."""
        prompt = DynamicCache(config=self.model.config.text_config)
        out = self.model(
            **batch,
            mm_token_type_ids=image_tokens(self.model, batch),
            past_key_values=prompt,
            use_cache=True,
            logits_to_keep=1,
        )
        length = batch["input_ids"].shape[1]
        for layer, filled in zip(self.cache.layers, prompt.layers, strict=True):
            layer.keys[:, :, :length].copy_(filled.keys)
            layer.values[:, :, :length].copy_(filled.values)
            layer.cumulative_length.fill_(length)
        self.token.copy_(out.logits.argmax(-1))
        self.answer[:, :1] = self.token
        self.position.copy_((length + self.model.model.rope_deltas).expand_as(self.position))
        self.cursor.fill_(length)
        self.number.fill_(1)
        for _ in range(new_tokens - 1):
            self.step()
        return self.answer[:, :new_tokens].clone()
