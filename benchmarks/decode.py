"""Decoding speed: the autoregressive source, our plain path and our fast path, in one run on the same weights.

    python benchmarks/decode.py                          # a shape that a CPU can measure
    python benchmarks/decode.py --shape 4b --settings 32:8 --dtype bfloat16   # on a GPU
    python benchmarks/decode.py --checkpoint DIR

The plain path does what the reference implementation does (separate commit forwards, LM head and softmax at every
position of every forward, the prompt's included, a concatenated cache). The floor is the time it takes to read the
weights and the cache of one forward once at the measured copy bandwidth.
"""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from _common import PeakMemory, copy_bandwidth, environment, image_prompt, table, timed, write_results
from transformers import Qwen3VLForConditionalGeneration
from transformers.utils import logging as hf_logging

from nemo_bard import BardVLConfig, BardVLForConditionalGeneration
from nemo_bard.cost.shapes import SHAPES, make_config

COLUMNS = {
    "path": "path|s",
    "batch": "batch|d",
    "block_size": "B|d",
    "steps": "steps|d",
    "tokens_per_second": "tok/s|.1f",
    "speedup": "x plain|.2f",
    "tpf": "TPF|.2f",
    "forwards": "forwards|d",
    "ms_per_forward": "ms/fwd|.2f",
    "floor_ms": "floor ms|.2f",
    "peak_mib": "peak MiB|.0f",
    "seconds": "seconds|.2f",
}


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument(
        "--shape", choices=SHAPES, default="4b" if on_gpu else "cpu", help="random weights of this shape"
    )
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint folder instead of random weights")
    parser.add_argument(
        "--settings", nargs="+", default=["8:2", "32:8"], metavar="B:STEPS", help="block size and steps"
    )
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1])
    parser.add_argument(
        "--paths", nargs="+", choices=("ar", "plain", "fast", "eager"), help="eager: fast, not compiled"
    )
    parser.add_argument("--strategy", default="low_confidence_static")
    parser.add_argument("--threshold", type=float, default=0.5, help="confidence threshold of the dynamic strategy")
    parser.add_argument("--prompt-tokens", type=int, default=514)
    parser.add_argument("--image-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3, help="measurements per row, interleaved; the median counts")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, help="result file (JSON); default benchmarks/results/decode_<shape>.json"
    )
    args = parser.parse_args()
    if args.paths is None:
        args.paths = ["ar", "plain", "eager", "fast"] if args.device.startswith("cuda") else ["ar", "plain", "fast"]
    return args


def build_models(args: argparse.Namespace) -> tuple[BardVLForConditionalGeneration, Qwen3VLForConditionalGeneration]:
    """The BARD model and an autoregressive one that shares its weights."""
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    if args.checkpoint:
        bard = BardVLForConditionalGeneration.from_pretrained(args.checkpoint, dtype=dtype).to(device)
    else:
        torch.manual_seed(args.seed)
        source = make_config(args.shape)
        fields = {k: v for k, v in source.to_dict().items() if k not in ("model_type", "architectures")}
        config = BardVLConfig(**fields, mask_token_id=source.text_config.vocab_size - 1, eos_token_id=None)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                bard = BardVLForConditionalGeneration(config)
        finally:
            torch.set_default_dtype(before)
    bard.eval()
    bard.config.eos_token_id = None  # random answers must not end early
    with torch.device("meta"):
        source_config = make_config("tiny").__class__(
            **{k: v for k, v in bard.config.to_dict().items() if k not in ("model_type", "architectures")}
        )
        autoregressive = Qwen3VLForConditionalGeneration(source_config)
    autoregressive.model, autoregressive.lm_head = bard.model, bard.lm_head
    return bard, autoregressive.eval()


def run_once(
    path: str, models: tuple, batch: dict, args: argparse.Namespace, block_size: int, steps: int
) -> dict[str, Any]:
    """Decode once and say how long it took."""
    bard, autoregressive = models
    device = torch.device(args.device)
    rows = batch["input_ids"].shape[0]
    if path == "ar":
        types = (batch["input_ids"] == bard.config.image_token_id).int()
        seconds, _ = timed(
            lambda: autoregressive.generate(
                **batch,
                mm_token_type_ids=types,
                min_new_tokens=args.new_tokens,
                max_new_tokens=args.new_tokens,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            ),
            device,
        )
        return {"seconds": seconds, "forwards": args.new_tokens, "tokens": rows * args.new_tokens, "tpf": 1.0}
    how = {
        "plain": {"decode_path": "plain"},
        "eager": {"cache_implementation": "dynamic"},
        "fast": {},
    }[path]
    seconds, out = timed(
        lambda: bard.generate(
            batch,
            max_new_tokens=args.new_tokens,
            block_size=block_size,
            denoising_steps=steps,
            remasking_strategy=args.strategy,
            confidence_threshold=args.threshold,
            return_dict_in_generate=True,
            **how,
        ),
        device,
    )
    return {
        "seconds": seconds,
        "forwards": out.forwards,
        "tokens": int(out.lengths.sum()),
        "tpf": float(out.tokens_per_forward.mean()),
        "split": out.seconds,
        "ids": out.sequences.tolist(),
    }


def floor_seconds(bard: BardVLForConditionalGeneration, bandwidth: float, rows: int, tokens: int) -> float:
    """Time to read text weights, LM head and a cache of ``tokens`` once."""
    text = bard.model.language_model
    weights = [p for name, p in text.named_parameters() if "embed_tokens" not in name] + [bard.lm_head.weight]
    config = bard.config.text_config
    cache = 2 * rows * tokens * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return (sum(p.numel() * p.element_size() for p in weights) + cache * weights[0].element_size()) / bandwidth


def main() -> None:
    """Measure and report."""
    args = parse_args()
    hf_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="block_size=")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    models = build_models(args)
    bandwidth = copy_bandwidth(device)
    rows: list[dict[str, Any]] = []
    for batch_size in args.batch_sizes:
        batch = image_prompt(
            models[0].config,
            rows=batch_size,
            prompt_tokens=args.prompt_tokens,
            image_tokens=args.image_tokens,
            seed=args.seed,
        )
        dtype = getattr(torch, args.dtype)
        batch = {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in batch.items()}
        for setting in args.settings:
            block_size, steps = (int(x) for x in setting.split(":"))
            runs: dict[str, list[dict[str, Any]]] = {path: [] for path in args.paths}
            peaks = dict.fromkeys(args.paths, 0)
            for path in args.paths:  # warm up: allocator, threads, compiled code
                run_once(path, models, batch, args, block_size, steps)
            for _ in range(args.repeat):
                for path in args.paths:
                    with PeakMemory(device) as memory:
                        runs[path].append(run_once(path, models, batch, args, block_size, steps))
                    peaks[path] = max(peaks[path], memory.bytes)
            if {"plain", "fast"} <= set(args.paths) and args.dtype == "float32":
                same = runs["plain"][0]["ids"] == runs["fast"][0]["ids"]
                if not same:
                    raise SystemExit("error: the plain and the fast path gave different ids")
            medians = {path: sorted(runs[path], key=lambda r: r["seconds"])[args.repeat // 2] for path in args.paths}
            cached = args.prompt_tokens + args.new_tokens // 2
            for path, run in medians.items():
                rows.append(
                    {
                        "path": path,
                        "batch": batch_size,
                        "block_size": 1 if path == "ar" else block_size,
                        "steps": 1 if path == "ar" else steps,
                        "tokens_per_second": run["tokens"] / run["seconds"],
                        "speedup": medians["plain"]["seconds"] / run["seconds"] if "plain" in medians else None,
                        "tpf": run["tpf"],
                        "forwards": run["forwards"],
                        "ms_per_forward": 1000 * run["seconds"] / run["forwards"],
                        "decode_ms_per_forward": 1000 * run["split"]["decode"] / max(run["forwards"] - 1, 1)
                        if "split" in run
                        else None,
                        "floor_ms": 1000 * floor_seconds(models[0], bandwidth, batch_size, cached),
                        "peak_mib": peaks[path] / 2**20,
                        "seconds": run["seconds"],
                        "split": run.get("split"),
                    }
                )
            print(table(rows[-len(medians) :], COLUMNS), flush=True)  # noqa: T201
            print(flush=True)  # noqa: T201
    payload = {
        **environment(device, getattr(torch, args.dtype)),
        "copy_bandwidth_gb_s": bandwidth / 1e9,
        "shape": str(args.checkpoint or args.shape),
        "prompt_tokens": args.prompt_tokens,
        "image_tokens": args.image_tokens,
        "new_tokens": args.new_tokens,
        "strategy": args.strategy,
        "rows": rows,
    }
    name = f"decode_{args.checkpoint.name if args.checkpoint else args.shape}_{device.type}"
    print(f"written to {write_results(name, args.output, payload)}")  # noqa: T201


if __name__ == "__main__":
    main()
