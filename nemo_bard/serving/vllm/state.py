"""The state of requests in vLLM's runner, and the attention of a batch.

Context ``block``: nothing is causal, and every block of a prompt chunk is a sequence of its own, with the row's pages and
its own end, so that a token sees all that comes before its block and the whole of its block. Context ``causal``: a flag per
request says whether it is causal (prompt, commit) or not (a denoising step).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from nemo_bard.serving.vllm.edges import Edges, segments
from nemo_bard.serving.vllm.sampler import BardSampler


class BardModelState(DefaultModelState):
    """What vLLM's runner asks about requests to a BARD model."""

    num_new_sampled_tokens_per_step = 0

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
        """Prepare the slots; the arguments are vLLM's."""
        super().__init__(vllm_config, model, encoder_cache, device)
        self.hf_config = self.model_config.hf_config
        self.width = vllm_config.diffusion_config.canvas_length
        self.is_block_context = self.hf_config.context_attention == "block"
        # Written in place, at the same address: a CUDA graph reads what is there when it is replayed.
        self.committing = torch.ones(self.max_num_reqs, dtype=torch.bool, device=device)
        self.causal = torch.zeros(self.max_num_reqs, dtype=torch.int32, device=device)
        self.slots: dict[str, int] = {}
        self.edges: dict[int, Edges] = {}
        self.arrivals: dict[int, tuple[str, int]] = {}
        """For the sampler: id and response tokens so far of requests that take a slot."""

    def get_supported_generation_tasks(self) -> tuple[Any, ...]:
        """Text only."""
        return ("generate",)

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        """Ours, and no rejection sampler."""
        return BardSampler(self, sampler), None

    def get_additional_cg_support(self) -> tuple[AttentionCGSupport, str | None]:
        """With block context a prompt chunk has more sequences than requests, which no full CUDA graph may hold."""
        if self.is_block_context:
            return AttentionCGSupport.UNIFORM_BATCH, type(self).__name__
        return super().get_additional_cg_support()

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Take a request; one that was preempted brings its response so far."""
        super().add_request(req_index, new_req_data)
        self.slots[new_req_data.req_id] = req_index
        self.committing[req_index] = True  # as a prompt is
        prompt = new_req_data.prompt_token_ids
        self.arrivals[req_index] = (new_req_data.req_id, len(new_req_data.prefill_token_ids) - len(prompt))
        if self.is_block_context:
            self.edges[req_index] = Edges(prompt, self.hf_config)

    def remove_request(self, req_id: str) -> None:
        """Free what belongs to a request."""
        super().remove_request(req_id)
        slot = self.slots.pop(req_id, None)
        if slot is not None:
            self.edges.pop(slot, None)

    def prepare_attn(
        self,
        input_batch: Any,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Tensor,
        attn_groups: list[list[Any]],
        kv_cache_config: Any,
        for_capture: bool = False,
        ubatch_idx: int = 0,
        model_specific_attn_metadata: Any = None,
    ) -> dict[str, Any]:
        """Describe the attention of a batch; arguments and result are vLLM's."""
        del model_specific_attn_metadata
        is_full = cudagraph_mode == CUDAGraphMode.FULL
        rows = input_batch.num_reqs_after_padding if is_full else input_batch.num_reqs
        common = {
            "attn_groups": attn_groups,
            "num_tokens": input_batch.num_tokens_after_padding if is_full else input_batch.num_tokens,
            "slot_mappings": slot_mappings,
            "kv_cache_config": kv_cache_config,
            "max_seq_len": self.max_model_len,
            "for_cudagraph_capture": for_capture,
            "positions": input_batch.positions,
            "ubatch_idx": ubatch_idx,
        }
        is_cut = self.is_block_context and not is_full and not for_capture
        if is_cut and input_batch.is_prefilling_np[:rows].any():
            return build_attn_metadata(**common, **self._sequences(input_batch, block_tables))
        longest = input_batch.max_query_len or int(input_batch.num_scheduled_tokens.max())
        return build_attn_metadata(
            **common,
            num_reqs=rows,
            query_start_loc_gpu=input_batch.query_start_loc[: rows + 1],
            query_start_loc_cpu=torch.from_numpy(input_batch.query_start_loc_np[: rows + 1]),
            max_query_len=longest,
            seq_lens=input_batch.seq_lens,
            block_tables=block_tables,
            causal=False if self.is_block_context else self._causal_flags(input_batch, rows),
        )

    def _causal_flags(self, input_batch: Any, rows: int) -> Tensor:
        real = input_batch.num_reqs
        self.causal[:real] = self.committing[input_batch.idx_mapping[:real]].int()
        self.causal[real:rows] = 0
        return self.causal[:rows]

    def _sequences(self, input_batch: Any, block_tables: tuple[Tensor, ...]) -> dict[str, Any]:
        """The batch as sequences of one block each; rows that denoise or commit stay as they are."""
        count = input_batch.num_reqs
        known = [
            self.edges.get(int(slot)) if is_prefilling else None
            for slot, is_prefilling in zip(
                input_batch.idx_mapping_np[:count], input_batch.is_prefilling_np[:count], strict=True
            )
        ]
        row, sizes, behind = segments(
            known, input_batch.num_computed_tokens_np[:count], input_batch.num_scheduled_tokens[:count]
        )
        starts = torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32))
        index = torch.from_numpy(row).to(self.device, non_blocking=True)
        return {
            "num_reqs": len(sizes),
            "query_start_loc_gpu": starts.to(self.device, non_blocking=True),
            "query_start_loc_cpu": starts,
            "max_query_len": int(sizes.max()),
            "seq_lens": input_batch.seq_lens[index] - torch.from_numpy(behind).to(self.device, non_blocking=True),
            "block_tables": tuple(table[index] for table in block_tables),
            "causal": False,
        }
