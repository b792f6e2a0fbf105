"""Attention of one text layer on packed training rows, forward and backward: flex_attention against a dense mask.

    python benchmarks/attention.py                                        # on a GPU: 4b, rows of 2048, 4096, 8192 tokens

Paths:
    dense   scaled_dot_product_attention with the mask as bools, as training does with attn_implementation="sdpa"
    flex    compiled flex_attention with a block mask, as training does on a GPU (without one there is no backward: the
            backend `bard` takes the dense mask in strips)
    causal  scaled_dot_product_attention without a mask, half of all pairs: what the hardware can do
The time of building the mask is a column of its own; a step builds it once for all layers.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from _measure import PeakMemory, median_ms
from _models import add_arguments, bard_config
from _report import Results, Row, attempt, environment, table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nemo_bard.method.layout import PADDING, sample_layout
from nemo_bard.model.attention import bard_attention
from nemo_bard.train.masks import FLEX_TILE, block_mask, dense_mask

PATHS = ("dense", "flex", "causal")
TOLERANCE = {"float32": 5e-3, "bfloat16": 3e-2}
"""Of the largest value; flex's kernel may round products of float32 to 10 bits, bfloat16 has 8."""
COLUMNS = {
    "path": "path|s",
    "length": "length|d",
    "pairs": "visible pairs|.3f",
    "mask_ms": "mask ms|.3f",
    "ms": "fwd+bwd ms|.3f",
    "tflops": "TFLOP/s|.2f",
    "times_dense": "x dense|.2f",
    "error": "error|.4f",
    "peak_mib": "peak MiB|.0f",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    lengths = [2048, 4096, 8192] if torch.cuda.is_available() else [1024]
    parser.add_argument("--lengths", nargs="+", type=int, default=lengths, help="tokens of a packed row")
    parser.add_argument("--sample-tokens", type=int, default=900, help="tokens of a sample, about")
    parser.add_argument("--prompt-tokens", type=int, default=514)
    parser.add_argument("--block-size", type=int, default=8)
    return parser.parse_args(argv)


def packed_row(length: int, *, sample_tokens: int, prompt: int, block_size: int) -> dict[str, Tensor]:
    """Ids of a row of ``length`` tokens that samples of one turn fill, each ``[1, length]``; its end is padding."""
    number = max(1, length // sample_tokens)
    response = (length // number - prompt - block_size) // 2
    layout = sample_layout(prompt + response, [(prompt, prompt + response)], block_size)
    size = len(layout)
    fields = {"branch_ids": layout.branch, "block_ids": layout.block}
    row = {name: torch.zeros(1, length, dtype=torch.int64) for name in fields}
    row["sample_ids"] = torch.full((1, length), PADDING)
    for sample in range(number):
        where = slice(sample * size, (sample + 1) * size)
        row["sample_ids"][0, where] = sample
        for name, values in fields.items():
            row[name][0, where] = values
    return {**row, "input_ids": torch.zeros_like(row["sample_ids"])}


def make_attention(path: str, batch: Mapping[str, Any]) -> tuple[Callable[[], Any], Callable[..., Tensor]]:
    """What builds the mask of a path, and what attends with it: ``(query, key, value, mask) -> [N, H, L, D]``."""
    layer: Any = SimpleNamespace(is_causal=False, training=True)
    if path == "flex":
        on_gpu = batch["input_ids"].is_cuda
        make = block_mask if on_gpu else dense_mask
        return lambda: make(batch, "block"), lambda q, k, v, mask: bard_attention(layer, q, k, v, mask)[0].transpose(
            1, 2
        )
    if path == "dense":
        return lambda: dense_mask(batch, "block"), lambda q, k, v, mask: scaled_dot_product_attention(
            q, *(x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v)), attn_mask=mask
        )
    return lambda: None, lambda q, k, v, mask: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def measure(args: argparse.Namespace, path: str, length: int, expected: dict[str, Tensor]) -> Row:
    """One row of the table; the dense path fills ``expected`` with its output and gradients."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    text = bard_config(args.shape, args.block_size).text_config
    row = packed_row(length, sample_tokens=args.sample_tokens, prompt=args.prompt_tokens, block_size=args.block_size)
    batch = {key: value.to(device) for key, value in row.items()}
    generator = torch.Generator().manual_seed(args.seed)
    heads = {"query": text.num_attention_heads, "key": text.num_key_value_heads, "value": text.num_key_value_heads}
    inputs = {
        name: torch.randn(1, number, length, text.head_dim, generator=generator).to(device, dtype).requires_grad_()
        for name, number in heads.items()
    }
    grad = torch.randn(1, heads["query"], length, text.head_dim, generator=generator).to(device, dtype)
    grad[:, :, batch["sample_ids"][0] == PADDING] = 0
    make, attend = make_attention(path, batch)
    mask = make()

    def step() -> Tensor:
        for x in inputs.values():
            x.grad = None
        out = attend(*inputs.values(), mask)
        out.backward(grad)
        return out

    with PeakMemory(device) as memory:
        out = step()
    found = {
        "output": (out * (grad != 0)).detach(),
        **{name: x.grad for name, x in inputs.items() if x.grad is not None},
    }
    pairs = float(dense_mask(batch, "block").sum()) if path != "causal" else length * (length + 1) / 2
    if path == "dense":
        expected.update(found)
    ms = median_ms(step, device, repeat=max(args.repeat, 5))
    facts: Row = {
        "pairs": pairs / length**2,
        "mask_ms": median_ms(make, device, repeat=args.repeat),
        "ms": ms,
        "tflops": 3 * 4 * pairs * text.head_dim * heads["query"] / ms / 1e9,
        "peak_mib": memory.bytes / 2**20,
    }
    if path == "flex" and expected:
        facts["error"] = max(
            float((found[name] - value).abs().max() / value.abs().max()) for name, value in expected.items()
        )
        if not facts["error"] <= TOLERANCE[args.dtype]:
            facts["failed"] = f"differs from dense by {facts['error']:.4f} of the largest value"
    return facts


def main(argv: list[str] | None = None) -> int:
    """Measure and report; 1 if a row failed."""
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    facts = {
        **environment(device, getattr(torch, args.dtype)),
        **{key: getattr(args, key) for key in ("shape", "sample_tokens", "prompt_tokens", "block_size")},
        "flex_tile": FLEX_TILE,
    }
    results = Results(f"attention_{args.shape}_{device.type}", args.output, COLUMNS, facts)
    for length in args.lengths:
        expected: dict[str, Tensor] = {}
        rows = [
            attempt({"path": path, "length": length}, partial(measure, args, path, length, expected)) for path in PATHS
        ]
        for row in rows:
            if "ms" in row and "ms" in rows[0]:
                row["times_dense"] = rows[0]["ms"] / row["ms"]
        results.add(*rows)
        sys.stdout.write(f"{table(rows, COLUMNS)}\n\n")
    sys.stdout.write(f"written to {results.path}\n")
    return int(any("failed" in row for row in results.rows))


if __name__ == "__main__":
    sys.exit(main())
