"""How likely a model finds a given response: a bound from masked draws, or exactly, token by token.

A block-diffusion model knows ``p(response) = prod_b p(x^b | context, x^<b)`` block by block, and of a block a lower bound
(block diffusion, arXiv 2503.09573). With ``n`` response tokens in block ``b``, ``l`` of them masked,

    log p(x^b | ...)  >=  E_{l ~ U{1..n}} E_{masks of l tokens} [ n / l * sum_{masked i} log p(x_i | visible tokens of b, ...) ],

the form of LLaDA (arXiv 2502.09992, equation 6): its expectation is that of masking each token with probability
``t ~ U(0, 1)`` and weighting by ``1 / t``, as in training, and its variance is smaller. Places of the last block behind the
response stay masked, as they are when decoding begins. A block with few enough tokens has all its masks counted, and the
bound is then free of chance. A bound lies under the log-probability by how much the model's answers depend on the order in
which tokens are found.

With ``context_attention: causal`` the context also predicts its next token (trained by ``ar_loss_weight``), which gives
``sum_i log p(x_i | x_<i)`` exactly, in one forward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nemo_bard.base.errors import not_one_of
from nemo_bard.generation.prompt import prepare_prompt
from nemo_bard.method.layout import (
    NOISY,
    RowOptions,
    SampleLayout,
    TokenIds,
    attention_mask,
    find_responses,
    sample_layout,
)

if TYPE_CHECKING:
    from nemo_bard.model.modeling import BardVLForConditionalGeneration

METHODS = ("auto", "estimated", "exact")
NOISY_TOKENS = 1024
"""Noisy tokens of one forward; more draws take further ones."""
LOGITS_AT_ONCE = 256
"""Tokens whose logits exist at once."""


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """What a response's tokens are worth to the model."""

    log_prob: float
    """Natural logarithm, summed over the tokens; of ``estimated`` an estimate of a lower bound."""
    num_tokens: int
    method: str
    """``exact`` or ``estimated``."""


class Draws(NamedTuple):
    """Masks of a response, and what the log-probabilities under them are multiplied with before they are summed."""

    masks: Tensor
    """``[K, R]`` bool, ``R`` the response's tokens filled up to whole blocks; True where masked."""
    weights: Tensor
    """``[K, R]`` float32; 0 where visible, behind the response, and in draws that a block does not need."""


def resolve_method(method: str, context_attention: str) -> str:
    """Turn ``auto`` into ``exact`` for a causal context, else ``estimated``.

    Raises:
        ValueError: For an unknown method, or ``exact`` where the context does not predict its next token.
    """
    if method not in METHODS:
        raise not_one_of("loglikelihood", method, METHODS)
    if method == "exact" and context_attention != "causal":
        raise ValueError(
            f"loglikelihood=exact needs a checkpoint with context_attention: causal, this one has {context_attention};"
            " use estimated"
        )
    if method == "auto":
        return "exact" if context_attention == "causal" else "estimated"
    return method


def make_draws(num_tokens: int, block_size: int, draws: int, seed: int) -> Draws:
    """Choose masks for the bound.

    Args:
        num_tokens: Response tokens, at least 1.
        block_size: ``B``.
        draws: Masks of a block; a block of ``n`` tokens with at most that many masks (``2^n - 1``) has each of them once.
        seed: Decides the masks; nothing else does.

    Returns:
        Masks of all blocks side by side, and weights with which the sum is the bound.
    """
    generator = torch.Generator().manual_seed(seed)
    masks, weights = [], []
    for start in range(0, num_tokens, block_size):
        size = min(block_size, num_tokens - start)
        block = _every_mask(size) if 2**size - 1 <= draws else _drawn_masks(size, draws, generator)
        behind = block_size - size
        masks.append(torch.nn.functional.pad(block.masks, (0, behind), value=True))
        weights.append(torch.nn.functional.pad(block.weights, (0, behind)))
    most = max(len(one) for one in masks)
    masks = [torch.nn.functional.pad(one, (0, 0, 0, most - len(one)), value=True) for one in masks]
    weights = [torch.nn.functional.pad(one, (0, 0, 0, most - len(one))) for one in weights]
    return Draws(torch.cat(masks, 1), torch.cat(weights, 1))


def _every_mask(size: int) -> Draws:
    numbers = torch.arange(1, 2**size).unsqueeze(1)
    masks = (numbers >> torch.arange(size)) % 2 == 1
    counts = masks.sum(1).tolist()
    scale = torch.tensor([1 / (count * math.comb(size, count)) for count in counts])
    return Draws(masks, masks * scale.unsqueeze(1))


def _drawn_masks(size: int, draws: int, generator: torch.Generator) -> Draws:
    """Numbers of masked tokens spread evenly over 1 to ``size``, each uniform by itself."""
    spread = (torch.rand(1, generator=generator) + torch.arange(draws) / draws) % 1
    counts = (1 + (spread * size).long()).clamp_max(size).unsqueeze(1)
    ranks = torch.rand(draws, size, generator=generator).argsort(1).argsort(1)
    masks = ranks < counts
    return Draws(masks, masks * (size / (draws * counts)))


@torch.no_grad()
def response_likelihood(
    model: BardVLForConditionalGeneration,
    inputs: Mapping[str, Tensor],
    response: Tensor,
    *,
    method: str = "auto",
    draws: int = 128,
    seed: int = 0,
) -> Likelihood:
    """Log-probability of a response to a prompt.

    Args:
        model: The model.
        inputs: One prompt as the processor returned it, with the header of the turn to answer at its end.
        response: Token ids ``[R]`` int64; an end token counts only if it is among them.
        method: One of ``METHODS``.
        draws: Most masks of a block for ``estimated``.
        seed: Decides the masks of ``estimated``, alike for every call.

    Returns:
        The log-probability, and how it was found.

    Raises:
        ValueError: For an empty response, one that holds placeholders of media, a batch of prompts, or what the model
            cannot do.
    """
    config = model.config
    method = resolve_method(method, config.context_attention)
    if config.block_size is None:
        raise ValueError("block_size is not set in the model's config.json; a likelihood needs it")
    if len(response) == 0:
        raise ValueError("the response holds no token")
    if bool(torch.isin(response, torch.tensor([config.image_token_id, config.video_token_id])).any()):
        raise ValueError("the response holds a placeholder of an image or video")
    if len(inputs["input_ids"]) != 1:
        raise ValueError(f"a likelihood takes one prompt, got {len(inputs['input_ids'])} rows")
    row = _Row(model, inputs, response.cpu())
    if method == "exact":
        log_prob = row.next_token_log_probs().sum().item()
    else:
        chosen = make_draws(len(response), config.block_size, draws, seed)
        copies = max(1, NOISY_TOKENS // chosen.masks.shape[1])
        parts = zip(chosen.masks.split(copies), chosen.weights.split(copies), strict=True)
        log_prob = sum(row.weighted_log_probs(masks, weights) for masks, weights in parts)
    return Likelihood(log_prob=log_prob, num_tokens=len(response), method=method)


class _Row:
    """A prompt and its response, laid out as for training: ``[context | noisy copies of the response]``."""

    def __init__(self, model: BardVLForConditionalGeneration, inputs: Mapping[str, Tensor], response: Tensor) -> None:
        self.model, config = model, model.config
        end_ids = config.end_ids
        assert config.block_size is not None
        prompt = prepare_prompt(
            model,
            dict(inputs),
            block_size=config.block_size,
            max_new_tokens=len(response),
            end_ids=end_ids,
        )
        ids = prompt.input_ids[0].cpu()
        self.vision = prompt.vision
        self.context = torch.cat([ids, response])
        self.span = (len(ids), len(self.context))
        self.responses = [*find_responses(ids, config.assistant_header_ids, end_ids), self.span]
        after = prompt.next_position.cpu() + torch.arange(len(response))
        self.positions = torch.cat([prompt.position_ids.cpu(), after.expand(3, 1, -1)], 2)

    def weighted_log_probs(self, masks: Tensor, weights: Tensor) -> float:
        """Sum of ``weights`` times the log-probabilities of clean tokens under ``masks``, both ``[copies, R]``."""
        assert self.model.config.mask_token_id is not None
        layout = self._layout(len(masks))
        noisy = layout.branch == NOISY
        targets = self._clean(layout)
        hidden = masks.flatten() | layout.padding[noisy]
        ids = targets.clone()
        ids[noisy] = torch.where(hidden, self.model.config.mask_token_id, targets[noisy])
        counted = weights.flatten() > 0
        where = noisy.nonzero().flatten()[counted]
        return float((self._forward(layout, ids, where, targets[where]) * weights.flatten()[counted]).sum())

    def next_token_log_probs(self) -> Tensor:
        """``log p(x_i | x_<i)`` of the response's tokens, ``[R]``, from the context."""
        layout = self._layout(1, next_token=True)
        ids = self._clean(layout)
        start, end = self.span
        return self._forward(layout, ids, torch.arange(start - 1, end - 1), self.context[start:end])

    def _layout(self, copies: int, *, next_token: bool = False) -> SampleLayout:
        assert self.model.config.block_size is not None
        return sample_layout(
            len(self.context),
            self.responses,
            self.model.config.block_size,
            supervised=[len(self.responses) - 1],
            options=RowOptions(noisy_copies=copies, next_token=next_token),
        )

    def _clean(self, layout: SampleLayout) -> Tensor:
        """Clean ids of a row, ``[L]``; the last token's behind the response's end."""
        return self.context[torch.where(layout.padding, self.span[1] - 1, layout.source)]

    def _forward(self, layout: SampleLayout, ids: Tensor, where: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities of ``targets`` at the places ``where`` of a row, ``[K]`` float32 on the CPU."""
        device = self.model.device
        order = torch.arange(len(layout))
        row = TokenIds(torch.zeros_like(order), layout.branch, layout.block, order)
        row = TokenIds(*(part.to(device) for part in row))
        mask = attention_mask(row, row, context_attention=self.model.config.context_attention)
        source = torch.where(layout.padding, self.span[1] - 1, layout.source)
        goal = targets.to(device)

        def log_probs(hidden: Tensor, weight: Tensor) -> Tensor:
            parts = zip(hidden.split(LOGITS_AT_ONCE), goal.split(LOGITS_AT_ONCE), strict=True)
            return torch.cat(
                [(h @ weight.T).float().log_softmax(-1).gather(1, g.unsqueeze(1)).squeeze(1) for h, g in parts]
            )

        found = self.model(
            input_ids=ids.unsqueeze(0).to(device),
            attention_mask=mask[None, None],
            position_ids=(self.positions[:, :, source] + layout.offset).to(device),
            output_positions=where.to(device),
            output_fn=log_probs,
            use_cache=False,
            **self.vision,
        )
        return found.cpu()
