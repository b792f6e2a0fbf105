"""The vision tower with its mergers, forward: images of several sizes, alone and together.

python benchmarks/vision.py                 # on a GPU: 4b, bfloat16
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from _measure import PeakMemory, count_syncs, device_seconds, median_ms
from _models import add_arguments, bard_config, image_prompt, random_model
from _report import Results, Row, attempt, environment, table

from nemo_bard import BardVLForConditionalGeneration
from nemo_bard.cost.count import peak_flops, row_flops

COLUMNS = {
    "images": "images|d",
    "image_tokens": "tokens each|d",
    "patches": "patches|d",
    "ms": "ms|.2f",
    "tflops": "TFLOP/s|.3f",
    "mfu": "MFU|.3f",
    "idle_ms": "idle ms|.2f",
    "syncs": "syncs|d",
    "peak_mib": "peak MiB|.0f",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    images = ["1:256", "1:1024", "8:400"] if torch.cuda.is_available() else ["1:256"]
    parser.add_argument("--images", nargs="+", default=images, metavar="NUMBER:TOKENS", help="images and their tokens")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace, model: BardVLForConditionalGeneration, images: int, tokens: int) -> Row:
    """One row of the table."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    prompt = image_prompt(model.config, rows=images, prompt_tokens=tokens + 16, image_tokens=tokens, seed=args.seed)
    pixels, grid = prompt["pixel_values"].to(device, dtype), prompt["image_grid_thw"]

    def forward() -> None:
        with torch.no_grad():
            model.get_image_features(pixels, grid, return_dict=True)

    ms = median_ms(forward, device, repeat=max(args.repeat, 5))
    with PeakMemory(device) as memory:
        forward()
    busy = device_seconds(forward, device)
    flops = row_flops(model.config, tokens=0, pairs=0, supervised=0, frames=grid.prod(-1).tolist()).vision
    known = peak_flops(torch.cuda.get_device_name(device), args.dtype) if device.type == "cuda" else None
    return {
        "patches": len(pixels),
        "ms": ms,
        "tflops": flops / ms / 1e9,
        "mfu": flops / ms * 1000 / known if known else None,
        "idle_ms": None if busy is None else max(ms - 1000 * busy, 0.0),
        "syncs": count_syncs(forward, device),
        "peak_mib": memory.bytes / 2**20,
    }


def main(argv: list[str] | None = None) -> int:
    """Measure and report; 1 if a row failed."""
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    results = Results(
        f"vision_{args.shape}_{device.type}", args.output, COLUMNS, {**environment(device, dtype), "shape": args.shape}
    )
    model = random_model(bard_config(args.shape, 8), device=device, dtype=dtype, seed=args.seed).eval()
    for images, tokens in (map(int, text.split(":")) for text in args.images):
        row = {"images": images, "image_tokens": tokens}
        results.add(attempt(row, partial(measure, args, model, images, tokens)))
    sys.stdout.write(f"{table(results.rows, COLUMNS)}\n\nwritten to {results.path}\n")
    return int(any("failed" in row for row in results.rows))


if __name__ == "__main__":
    sys.exit(main())
