"""From pixels to the language model's input without making the host wait for the device.

transformers (5.18.0) asks the device in every block of the vision tower how long its images are, and then where their
placeholders lie in the row. Both are known beforehand: the grids are on the host, and a grid says how many tokens it takes.
Classes here keep transformers' parameters, names and numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLModel,
    Qwen3VLModelOutputWithPast,
    Qwen3VLVisionModel,
)
from transformers.utils.generic import can_return_tuple
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from nemo_bard.model.attention import NAME
from nemo_bard.model.sequences import Sequences
from nemo_bard.upstream.qwen3_vl import TextModel
from nemo_bard.upstream.torch import check_without_waiting, to_device_without_waiting
from nemo_bard.upstream.transformers import attn_implementation, become_model

Grids = Tensor | Sequence[Sequence[int]]
"""Patches of each image or video in time, height and width, ``[media, 3]``. A tensor on the device makes the host wait; a
list stays on the host whatever wraps the model (FSDP moves all tensors to the device)."""


class PlacedFeatures(NamedTuple):
    """Embedded tokens with image and video features at their placeholders; ``V`` placeholders in all."""

    inputs_embeds: Tensor
    """``[N, L, H]``."""
    positions: Tensor
    """Flat indices of the placeholders into ``[N * L]``, ``[V]`` int64."""
    deepstack: list[Tensor]
    """What is added there after the first layers, each ``[V, H]``."""


class VisionTower(Qwen3VLVisionModel):
    """Qwen3-VL's vision tower; whatever depends on the grids alone is computed on the host."""

    def forward(self, hidden_states: Tensor, grid_thw: Grids, **kwargs: Any) -> Any:
        """As transformers'.

        Args:
            hidden_states: Patches, ``[patches, values]``.
            grid_thw: See ``Grids``.
            **kwargs: What ``from_grids`` would compute, if it is known, and options.
        """
        grids = host_grids(grid_thw)
        return super().forward(
            hidden_states, grid_thw=grids, **{**self.from_grids(grids, hidden_states.device), **kwargs}
        )

    def from_grids(self, grids: Tensor, device: torch.device) -> dict[str, Any]:
        """Arguments of transformers' forward that it would compute from grids on the device.

        Args:
            grids: On the CPU, ``[media, 3]``.
            device: That of the patches.
        """
        indices, weights = get_vision_interpolation_indices_and_weights(
            grids,
            num_grid_per_side=self.num_grid_per_side,
            mode=self.interpolation_mode,
            align_corners=self.interpolation_align_corners,
            spatial_merge_size=self.spatial_merge_size,
        )
        on_device = {
            "interp_indices": indices,
            "interp_weights": weights,
            "position_ids": get_vision_position_ids(grids, self.spatial_merge_size),
        }
        found: dict[str, Any] = {key: to_device_without_waiting(x, device) for key, x in on_device.items()}
        starts = get_vision_cu_seqlens(grids)
        lengths = tuple(starts.diff().tolist())
        implementation = attn_implementation(self.config) or ""
        if implementation == NAME:  # it gets all sequences at once, instead of one call for each
            found |= {"cu_seqlens": starts[[0, -1]], "sequences": Sequences.of(lengths, device)}
        elif "flash" in implementation:
            found |= {"cu_seqlens": to_device_without_waiting(starts, device), "max_seqlen": max(lengths)}
        else:
            found["cu_seqlens"] = starts
        return found


class VisionLanguageModel(Qwen3VLModel):
    """Qwen3-VL without its LM head; puts features to their placeholders by index."""

    language_model: TextModel
    visual: VisionTower

    @can_return_tuple
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        image_grid_thw: Grids | None = None,
        video_grid_thw: Grids | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers'; grids may be lists.

        Raises:
            ValueError: If there are more or fewer placeholders than features (on the CPU; a GPU stops at an assertion).
        """
        grids: dict[str, Any] = {
            name: None if value is None else host_grids(value)
            for name, value in (("image_grid_thw", image_grid_thw), ("video_grid_thw", video_grid_thw))
        }
        context: dict[str, Any] = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
        }
        if input_ids is None or inputs_embeds is not None:
            pixels: dict[str, Any] = {"pixel_values": pixel_values, "pixel_values_videos": pixel_values_videos}
            given: dict[str, Any] = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
            return super().forward(**given, **pixels, **grids, **context, **kwargs)
        types, encoded = kwargs.pop("mm_token_type_ids", None), dict(kwargs.pop("mm_encoder_outputs", None) or {})
        options: dict[str, Any] = {"return_dict": True, **kwargs}
        if encoded and (pixel_values is not None or pixel_values_videos is not None):
            raise ValueError("pixel_values and mm_encoder_outputs exclude each other")
        tower: Any = self  # transformers' annotations name kinds of tensors that type checkers do not convert to
        if pixel_values is not None:
            encoded["image"] = tower.get_image_features(pixel_values, grids["image_grid_thw"], **options)
        if pixel_values_videos is not None:
            encoded["video"] = tower.get_video_features(pixel_values_videos, grids["video_grid_thw"], **options)
        placed = self.place(input_ids, encoded)
        if position_ids is None:
            context["position_ids"] = self.compute_3d_position_ids(
                input_ids,
                placed.inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                mm_token_type_ids=types,
                **grids,
            )
        outputs = self.language_model(
            input_ids=None,
            inputs_embeds=placed.inputs_embeds,
            visual_pos_masks=placed.positions if placed.deepstack else None,
            deepstack_visual_embeds=placed.deepstack or None,
            **context,
            **kwargs,
        )
        return Qwen3VLModelOutputWithPast(**outputs, rope_deltas=cast("torch.LongTensor | None", self.rope_deltas))

    def place(self, input_ids: Tensor, encoded: Mapping[str, Any]) -> PlacedFeatures:
        """Embed tokens, and put features to their placeholders.

        Args:
            input_ids: ``[N, L]``.
            encoded: What ``get_image_features`` and ``get_video_features`` returned, as ``image`` and ``video``.

        Raises:
            ValueError: See ``forward``.
        """
        embeds = self.get_input_embeddings()(input_ids)
        flat, positions, deepstack = embeds.flatten(0, 1), [], []
        for kind, token in (("image", self.config.image_token_id), ("video", self.config.video_token_id)):
            if encoded.get(kind) is None:
                continue
            features = torch.cat(encoded[kind].pooler_output).to(flat.device, flat.dtype)
            places = placeholder_positions(input_ids, token, len(features), kind)
            flat = flat.index_copy(0, places, features)
            positions.append(places)
            deepstack.append([torch.cat(one) for one in encoded[kind].deepstack_features])
        layers = [torch.cat(layer) for layer in zip(*deepstack, strict=True)]
        where = torch.cat(positions) if positions else input_ids.new_empty(0)
        return PlacedFeatures(flat.view_as(embeds), where, layers)


def host_grids(grids: Grids) -> Tensor:
    """Grids as a tensor on the CPU."""
    return grids.cpu() if isinstance(grids, Tensor) else torch.tensor(grids, dtype=torch.int64).view(-1, 3)


def placeholder_positions(input_ids: Tensor, token_id: int, number: int, kind: str) -> Tensor:
    """Flat indices of the placeholders, ``[number]`` int64.

    Args:
        input_ids: ``[N, L]``.
        token_id: That of a placeholder.
        number: How many there are, which the host has to know.
        kind: What they stand for, for the message.

    Raises:
        ValueError: See ``VisionLanguageModel.forward``.
    """
    found = (input_ids == token_id).flatten()
    check_without_waiting(
        found.sum() == number, f"the number of {kind} tokens is not the number of {kind} features, {number}"
    )
    return torch.nonzero_static(found, size=number).squeeze(1)


def take_vision_from_host(model: Qwen3VLModel) -> None:
    """Give a model that is built the classes above; parameters and their names stay."""
    become_model(model, VisionLanguageModel)
    become_model(model.visual, VisionTower)
    become_model(model.language_model, TextModel)
