"""The decode settings of requests: equal ones share a rule, and a batch is denoised rule by rule, not request by request."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nemo_bard.generation.parameters import GENERAL, build_settings, setting_fields
from nemo_bard.generation.resolve import DecodeSettings
from nemo_bard.generation.sampling import draw_seeds
from nemo_bard.generation.steps import StepRule
from nemo_bard.serving.requests import SEED
from nemo_bard.serving.vllm.config import SHARED, ServedBardVLConfig, end_ids

STEP_SETTINGS = (
    "denoising_steps",
    "remasking_strategy",
    "edit_threshold",
    "max_post_edit_steps",
    "suppress_mask_token",
    *SHARED,
)
"""The general settings that a step depends on."""


@dataclass(frozen=True)
class Asked:
    """What the sampler has to know of a request."""

    rule: StepRule
    seed: int
    """Of its random numbers, int64."""
    stop_ids: tuple[int, ...]
    """Ids at which the scheduler ends it."""
    max_tokens: int


class Rules:
    """The rules of a server, made when a request first needs one."""

    def __init__(self, hf_config: ServedBardVLConfig, device: torch.device) -> None:
        """Prepare.

        Args:
            hf_config: The model's configuration, with ``served_defaults``.
            device: Where the sampler's tensors are.
        """
        assert hf_config.served_defaults is not None
        self.hf_config, self.device, self.defaults = hf_config, device, hf_config.served_defaults
        self.rules: dict[tuple[tuple[str, Any], ...], StepRule] = {}

    def of(self, params: Any, request_id: str) -> Asked:
        """Read the parameters of a request, which have been checked.

        Args:
            params: ``SamplingParams``; their ``extra_args`` win over their temperature, top_k, top_p and seed.
            request_id: Decides the random numbers of a request without a seed, so that all ranks draw alike.
        """
        extra = params.extra_args or {}
        shared = {name: getattr(params, name) for name in SHARED}
        shared["top_k"] = max(shared["top_k"], 0)
        values = {**self.defaults, **shared, **extra}
        rule = self.rule({name: value for name, value in values.items() if self._counts(name, values)})
        seed = extra.get(SEED, params.seed)
        stop_ids = set(params.stop_token_ids or ())
        if not params.ignore_eos:
            stop_ids |= {params.eos_token_id} - {None}
        return Asked(
            rule,
            seed=row_seed(seed) if seed is not None else _hash(request_id),
            stop_ids=tuple(sorted(stop_ids)),
            max_tokens=params.max_tokens or 2**31,
        )

    def _counts(self, name: str, values: Mapping[str, Any]) -> bool:
        return name in STEP_SETTINGS or (name in setting_fields(values["remasking_strategy"]) and name not in GENERAL)

    def rule(self, values: Mapping[str, Any]) -> StepRule:
        """The rule for the settings of a step."""
        key = tuple(sorted(values.items()))
        if key not in self.rules:
            given, strategy = build_settings(values)
            hf_config = self.hf_config
            ends, turn_ends = end_ids(hf_config, self.defaults)
            assert hf_config.block_size is not None
            assert hf_config.mask_token_id is not None
            settings = DecodeSettings(
                given=given,
                strategy=strategy,
                block_size=hf_config.block_size,
                denoising_steps=min(given.denoising_steps or hf_config.block_size, hf_config.block_size),
                mask_token_id=hf_config.mask_token_id,
                end_ids=tuple(ends),
                turn_end_ids=tuple(turn_ends),
                pad_token_id=hf_config.mask_token_id,
                context_attention=hf_config.context_attention,
                engine=object,  # vLLM runs the forwards
                compile_step=False,
            )
            self.rules[key] = StepRule(settings, self.device)
        return self.rules[key]


def row_seed(seed: int) -> int:
    """The number that ``generate`` gives to the only row of a call with a CPU generator seeded with ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    return int(draw_seeds(1, torch.device("cpu"), generator))


def _hash(request_id: str) -> int:
    return int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:8], "big") >> 1
