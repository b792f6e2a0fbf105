"""The prefix cache with blocks that see to their ends.

With ``context_attention: block`` the keys of a token depend on the tokens of its block that come later. The hash of a page
therefore holds, besides the tokens up to its end, the rest of the block that reaches beyond it (images among it included)
and where blocks end. Equal hashes then mean equal keys, whatever the sizes of pages and blocks are.
"""

from __future__ import annotations

from typing import Any

from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys, hash_block_tokens

from nemo_bard.serving.vllm.config import ServedBardVLConfig
from nemo_bard.serving.vllm.edges import keep_edges


class BlockHasher:
    """Hashes pages of requests, as vLLM's own hasher does."""

    def __init__(self, hf_config: ServedBardVLConfig, *, page_size: int, algorithm: str) -> None:
        """Prepare hashing.

        Args:
            hf_config: The model's configuration.
            page_size: Tokens of a hashed page.
            algorithm: Name of vLLM's hash function.
        """
        self.hf_config, self.page_size = hf_config, page_size
        self.function = get_hash_fn_by_name(algorithm)

    def __call__(self, request: Any) -> list[Any]:
        """Hashes of the pages of a request that are complete and have none yet."""
        edges, size = keep_edges(request, self.hf_config), self.page_size
        ids, length = request.all_token_ids, request.num_tokens
        parent = request.block_hashes[-1] if request.block_hashes else None
        begin = len(request.block_hashes) * size
        found: list[Any] = []
        while begin + size <= length:
            end = begin + size
            sees = edges.next(end)
            if sees > length:  # the rest of the block is not there yet
                break
            keys, _ = generate_block_hash_extra_keys(request, begin, end, 0)
            later, _ = generate_block_hash_extra_keys(request, end, sees, 0) if sees > end else (None, 0)
            inside = tuple((edges.between(begin, sees) - begin).tolist())
            extra = (*(keys or ()), ("bard", inside, tuple(ids[end:sees]), later))
            parent = hash_block_tokens(self.function, parent, ids[begin:end], extra)
            found.append(parent)
            begin = end
        return found
