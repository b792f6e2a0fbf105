"""What differs from Qwen3-VL, on transformers' class alone: block-diffusion attention, outputs at chosen positions, decoding.

Architecture and weight names are Qwen3-VL's. ``nemo_bard.model.modeling`` puts this on NeMo AutoModel's class;
``nemo_bard.checkpoints.self_contained`` writes this module and what it imports into folders that bring their own code. So
neither this module nor anything that it imports may need more than torch and transformers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLCausalLMOutputWithPast,
    Qwen3VLForConditionalGeneration,
    Qwen3VLTextMLP,
    Qwen3VLTextRMSNorm,
)

from nemo_bard.generation.entry import generate
from nemo_bard.generation.settings import BardGenerationConfig
from nemo_bard.method.chunked import OutputHead
from nemo_bard.model.attention import NAME
from nemo_bard.model.configuration import BardVLConfig
from nemo_bard.model.lean import slim
from nemo_bard.model.vision import take_vision_from_host
from nemo_bard.upstream.torch import become
from nemo_bard.upstream.transformers import attn_implementation, text_section

logger = logging.getLogger(__name__)

HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")


class BardVLForConditionalGeneration(Qwen3VLForConditionalGeneration):
    """Qwen3-VL trained and decoded as a block-diffusion model (BARD, arXiv 2604.16514).

    The attention pattern is the caller's: pass a 4-D bool ``attention_mask`` (see
    ``nemo_bard.method.layout``) and ``position_ids``; ``generate`` does so itself.
    """

    config_class = BardVLConfig
    generation_config_class = BardGenerationConfig
    config: BardVLConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    decoding_attention = NAME
    """Backend of ``generate``, whatever the model was loaded with."""

    def __init__(self, config: BardVLConfig) -> None:
        """Build the model from its configuration (a Qwen3-VL configuration is taken as a BARD one)."""
        super().__init__(config)
        take_vision_from_host(self.model)
        become(self.lm_head, OutputHead)  # the same parameters, initialised as Qwen3-VL does
        if text_section(config).hidden_act == "silu":
            slim(self.model.language_model, Qwen3VLTextRMSNorm, Qwen3VLTextMLP)

    @property
    def generation_config(self) -> BardGenerationConfig:
        """Settings of ``generate``; what transformers and AutoModel assign becomes a ``BardGenerationConfig``."""
        return self._generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig | None) -> None:
        self._generation_config = BardGenerationConfig.from_generation_config(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        output_positions: Tensor | None = None,
        output_fn: Callable[[Tensor, Tensor], Any] | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Run Qwen3-VL; with ``output_positions`` the LM head runs only there.

        Args:
            input_ids: Token ids, ``[N, L]`` int64.
            attention_mask: ``[N, 1, L, K]`` bool, True = may attend (rows without any True are allowed and give
                meaningless output), or whatever Qwen3-VL accepts.
            *args: Further positional arguments of Qwen3-VL's forward.
            output_positions: Flat indices into ``[N * L]``, ``[K]`` int64.
            output_fn: With ``output_positions``: called in the LM head's place, inside its forward, with the hidden
                states ``[K, H]`` and the head's weight ``[V, H]``; see ``nemo_bard.method.chunked``.
            logits_to_keep: As in Qwen3-VL; not used with ``output_positions``. Named here because AutoModel's recipes
                replace the loss of a model whose signature lacks it.
            **kwargs: Further arguments of Qwen3-VL's forward: ``position_ids`` ``[3, N, L]``, ``pixel_values``, ...

        Returns:
            Qwen3-VL's output; with ``output_positions`` its ``logits`` are ``[K, V]``; with ``output_fn`` what that
            returns, and nothing else.

        Raises:
            ValueError: If the LM head is not a plain one where ``output_fn`` needs it, or if a bool mask meets ``attn_implementation="eager"``, which would add it as 0/1.
        """
        self._check_mask(attention_mask)
        if output_positions is None:
            ids = cast("torch.LongTensor", input_ids)  # transformers declares what may be None as a tensor
            return super().forward(ids, attention_mask, *args, logits_to_keep=logits_to_keep, **kwargs)
        outputs = self.model(input_ids, attention_mask, *args, **kwargs)
        hidden = outputs[0].flatten(0, 1).index_select(0, output_positions)
        if output_fn is not None:
            if not isinstance(self.lm_head, OutputHead):
                raise ValueError(
                    f"lm_head became a {type(self.lm_head).__name__}; adapters on lm_head are not supported"
                )
            return self.lm_head(hidden, output_fn)
        return Qwen3VLCausalLMOutputWithPast(
            logits=self.lm_head(hidden),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _check_mask(self, attention_mask: Tensor | None) -> None:
        if (
            isinstance(attention_mask, Tensor)
            and attention_mask.ndim == 4
            and attention_mask.dtype == torch.bool
            and attn_implementation(text_section(self.config)) == "eager"
        ):
            raise ValueError(
                'attn_implementation="eager" adds a bool attention_mask as 0/1 and gives wrong results; use "sdpa"'
            )

    def generate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        inputs: Any = None,
        generation_config: BardGenerationConfig | None = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        streamer: Any = None,
        *,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Any:
        """Decode responses block by block (BARD, arXiv 2604.16514, section on inference).

        Both calls work: the model card's ``generate(batch, max_new_tokens=..., block_size=..., ...)`` with ``batch`` as
        the processor returned it, and transformers' ``generate(**batch, generation_config=...)``. Rows may differ in
        length and number of images; every row gets what it would get alone (exactly so at temperature 0).

        Args:
            inputs: What the processor returned, or ``input_ids`` ``[N, P]`` padded on either side with
                ``attention_mask``.
            generation_config: Settings; the model's ``generation_config`` if None.
            logits_processor: Called as in transformers with ``(input_ids [K, ...], logits [K, V])`` of the positions
                that are being denoised.
            stopping_criteria: Called as in transformers after each block.
            streamer: ``put`` gets the prompt, then each finished block; ``put_draft``, if there is one, the block after
                each step, and ``put_step`` the step's ``StepRecord``. An error that one of them raises ends the call.
            generator: Source of randomness for temperature > 0, on the model's device.
            **kwargs: Prompt tensors, and settings of ``BardGenerationConfig`` that override ``generation_config``.

        Returns:
            Response ids only, ``[N, longest]`` int64 (at most ``max_new_tokens``), the pad id after each row's end; with
            ``return_step_stats=True`` also statistics; with ``return_dict_in_generate=True`` a ``BardGenerateOutput``.

        Raises:
            ValueError: For an unknown name or a value that is not allowed, before any forward.
        """
        return generate(
            self,
            inputs,
            generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            streamer=streamer,
            generator=generator,
            **kwargs,
        )

    def adjust_generation_fn(
        self,
        generation_config: BardGenerationConfig | None,
        from_auto_class: bool,
        from_pipeline: bool | None,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Read ``generation_config.json`` as a ``BardGenerationConfig`` (transformers' hook of ``from_pretrained``)."""
        del from_auto_class, from_pipeline, args
        if generation_config is not None:
            self.generation_config = generation_config
        elif pretrained_model_name_or_path is not None:
            # the other keyword arguments of from_pretrained override fields of the model's configuration
            where = {name: value for name, value in kwargs.items() if name in HUB_ARGUMENTS}
            try:
                self.generation_config = BardGenerationConfig.from_pretrained(pretrained_model_name_or_path, **where)
            except OSError:
                logger.info("%s has no generation_config.json; using the defaults", pretrained_model_name_or_path)
