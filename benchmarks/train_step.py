"""One training step: a plain path and ours in one run on the same weights, samples and noise; packed and unpacked.

    python benchmarks/train_step.py                                       # the shape `cpu`, float32, length 1538
    python benchmarks/train_step.py --shape 4b --lengths 2048 8192 --activation-checkpointing   # on a GPU

The plain path does what the reference implementation does: the whole clean response and its padding are laid out, the
mask is dense and made on the CPU for each sample, logits are computed in float32 at all positions, one sample at a
time. Ours is the recipe's own code (``PBMObjective``, ``batch_loss``). All must give the same loss. Without a GPU every path
lives in a forked process, and its memory is the operating system's peak of that process; on a GPU it is the allocator's.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch
import torch.nn.functional as F
from _common import (
    Forked,
    environment,
    image_prompt,
    peak_resident_bytes,
    resident_bytes,
    table,
    timed,
    write_results,
)
from torch import Tensor

from nemo_bard import BardVLConfig, BardVLForConditionalGeneration
from nemo_bard.cost.count import peak_flops, training_flops
from nemo_bard.cost.shapes import SHAPES, make_config
from nemo_bard.data.collate import BlockDiffusionCollator, TrainingSample, lay_out_sample
from nemo_bard.method.corruption import NoiseContext, corrupt_batch
from nemo_bard.method.layout import PADDING, sample_layout
from nemo_bard.method.losses import BlockDiffusionCrossEntropy
from nemo_bard.method.objectives import PBMObjective, count
from nemo_bard.method.schedule import NoiseSettings
from nemo_bard.train.forward import batch_loss
from nemo_bard.train.masks import FLEX_TILE, dense_mask, uses_flex
from nemo_bard.upstream import cpu as cpu_compat

LOSS_TOLERANCE = 1e-4
COLUMNS = {
    "comparison": "comparison|s",
    "path": "path|s",
    "length": "length|d",
    "block_size": "B|d",
    "positions": "positions|d",
    "ms": "ms/step|.0f",
    "time_ratio": "time x|.2f",
    "supervised_per_second": "sup tok/s|.0f",
    "peak_mib": "peak MiB|.0f",
    "memory_ratio": "mem x|.2f",
    "tflops": "TFLOP/s|.3f",
    "mfu": "MFU|.3f",
    "loss": "loss|.6f",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--shape", choices=SHAPES, default="4b" if on_gpu else "cpu")
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        default=[2048, 4096, 8192] if on_gpu else [1538],
        help="tokens of a plain row: the prompt and twice the response",
    )
    parser.add_argument("--block-sizes", nargs="+", type=int, default=[8])
    parser.add_argument("--prompt-tokens", type=int, default=514)
    parser.add_argument("--image-tokens", type=int, default=256, help="image tokens of a prompt; 0 for none")
    parser.add_argument("--paths", nargs="+", choices=("plain", "ours"), default=["plain", "ours"])
    parser.add_argument(
        "--packing", type=int, default=4, help="samples of the comparison of packed and unpacked rows; 0 leaves it out"
    )
    parser.add_argument(
        "--attention",
        choices=("flex", "dense"),
        default="flex",
        help="masks of our paths on a GPU: flex_attention's block masks, or dense ones for sdpa; dense on CPU",
    )
    parser.add_argument("--loss-chunk-tokens", type=int, help="default: the recipe's")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--repeat", type=int, default=3, help="steps per path, interleaved; the median counts")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, help="result file; default benchmarks/results/train_step_<shape>_<device>.json"
    )
    args = parser.parse_args(argv)
    for length in args.lengths:
        if length < args.prompt_tokens + 4:
            parser.error(f"--lengths {length} leaves no response behind --prompt-tokens {args.prompt_tokens}")
    return args


def bard_config(shape: str, block_size: int) -> BardVLConfig:
    """Configuration of a shape with random weights; token ids move inside a small vocabulary."""
    source = make_config(shape)
    size = source.text_config.vocab_size
    fields = {k: v for k, v in source.to_dict().items() if k not in ("model_type", "architectures")}
    if source.image_token_id >= size:
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        fields.update({name: size - 8 + i for i, name in enumerate(names)})
    ids = {"mask_token_id": size - 1, "eos_token_id": size - 2, "assistant_header_ids": [1]}
    return BardVLConfig(**{**fields, **ids}, block_size=block_size)


def make_samples(
    args: argparse.Namespace, config: BardVLConfig, lengths: list[int], *, plain: bool
) -> list[TrainingSample]:
    """Random single-turn samples with a response of ``(length - prompt) // 2`` tokens each."""
    collator, samples = BlockDiffusionCollator(None, config), []
    for index, length in enumerate(lengths):
        prompt = image_prompt(
            config, rows=1, prompt_tokens=args.prompt_tokens, image_tokens=args.image_tokens, seed=args.seed + index
        )
        size, block = (length - args.prompt_tokens) // 2, config.block_size
        generator = torch.Generator().manual_seed(args.seed + index)
        text = torch.randint(10, config.vision_start_token_id - 10, (size - 1,), generator=generator)
        end = config.eos_token_id
        padding = -size % block if plain else 0
        ids = torch.cat([prompt["input_ids"][0], text, torch.tensor([end] * (1 + padding))])
        start, stop = args.prompt_tokens, len(ids)
        grid = prompt.get("image_grid_thw")
        positions = collator._positions(ids, {} if grid is None else {"image_grid_thw": grid})
        media = {"sample_index": index, "pixel_values": prompt.get("pixel_values"), "grid_thw": grid}
        if not plain:
            samples.append(lay_out_sample(ids, positions, [(start, stop)], block, **media))
            continue
        layout = sample_layout(stop, [(start, stop)], block, drop_last_clean_block=False)
        tokens, noisy = ids[layout.source], layout.response >= 0
        samples.append(
            TrainingSample(
                input_ids=tokens,
                labels=torch.where(noisy, tokens, -100),
                position_ids=positions[:, layout.source],
                branch=layout.branch,
                block=layout.block,
                response=layout.response,
                padding=noisy & (layout.source >= stop - padding),
                **media,
            )
        )
    return samples


def make_batches(
    args: argparse.Namespace, config: BardVLConfig, path: str, lengths: list[int], *, multiple: int = 1
) -> list[dict[str, Any]]:
    """Corrupted and weighed microbatches of one optimizer step: one per sample, or one packed row.

    Rows are padded to a ``multiple``, as the recipe does for flex_attention.
    """
    samples = make_samples(args, config, lengths, plain=path == "plain")
    rows = [samples] if path == "packed" else [[sample] for sample in samples]
    collator = BlockDiffusionCollator(None, config, pad_to_multiple_of=multiple)
    context = NoiseContext(
        block_size=config.block_size,
        mask_token_id=config.mask_token_id,
        num_random_ids=config.text_config.vocab_size - 16,
        seed=args.seed,
        epoch=0,
    )
    batches = [
        corrupt_batch({**collator.stack([row]), "num_dropped": 0}, NoiseSettings(name="mask"), context) for row in rows
    ]
    totals, objective = count(batches), PBMObjective(BlockDiffusionCrossEntropy())
    return [objective.weigh(batch, totals) for batch in batches]


def plain_loss(model: BardVLForConditionalGeneration, batch: dict[str, Any]) -> Tensor:
    """Dense mask made on the CPU, float32 logits and cross-entropy at all positions."""
    device = model.device
    mask = dense_mask(
        {key: batch[key].cpu() for key in ("input_ids", "sample_ids", "branch_ids", "block_ids")}, "block"
    )
    names = ("input_ids", "position_ids", "pixel_values", "image_grid_thw")
    logits = model(**{name: batch[name] for name in names}, attention_mask=mask.to(device), use_cache=False).logits
    weight = torch.zeros(batch["labels"].numel(), device=device)
    weight[batch["output_positions"]] = batch["output_weight"]
    per_token = F.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten(), reduction="none")
    return (per_token * weight).sum()


def build_model(args: argparse.Namespace, config: BardVLConfig, attention: str) -> BardVLForConditionalGeneration:
    """Random weights that depend on the seed alone."""
    torch.manual_seed(args.seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, args.dtype))
    try:
        with torch.device(args.device):
            model = BardVLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model.set_attn_implementation(attention)
    if args.activation_checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def build_step(
    args: argparse.Namespace, path: str, lengths: list[int], block_size: int
) -> Callable[[str], dict[str, Any]]:
    """Build model and microbatches of a path, warm up, and return what measures one forward and backward."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if path != "plain":
        cpu_compat.apply()  # as the recipe does
    start = resident_bytes()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    config = bard_config(args.shape, block_size)
    on_cpu = device.type == "cpu"  # there, the backend `bard` takes dense masks
    model = build_model(args, config, "bard" if path != "plain" and (on_cpu or args.attention == "flex") else "sdpa")
    flex = uses_flex(model.config, device)
    model.config.block_size = block_size
    batches = make_batches(args, config, path, lengths, multiple=FLEX_TILE if flex else 1)
    moved = [
        {
            key: (value.to(device, dtype) if key == "pixel_values" else value.to(device))
            if torch.is_tensor(value)
            else value
            for key, value in batch.items()
        }
        for batch in batches
    ]
    objective = PBMObjective(BlockDiffusionCrossEntropy())

    def loss_of(batch: dict[str, Any]) -> Tensor:
        if path == "plain":
            return plain_loss(model, batch)
        return batch_loss(model, model.config, objective, batch, chunk_tokens=args.loss_chunk_tokens)[0]

    def step() -> float:
        model.zero_grad(set_to_none=True)
        total = 0.0
        for batch in moved:
            loss = loss_of(batch)
            loss.backward()
            total += float(loss.detach())
        return total

    step()  # warm-up: allocator, threads, compiled code
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    facts = {
        "attention": "flex" if flex else "dense",
        "positions": sum(batch["input_ids"].numel() for batch in batches),
        "real_tokens": sum(int((batch["sample_ids"] != PADDING).sum()) for batch in batches),
        "supervised": sum(len(batch["output_positions"]) for batch in batches),
    }

    def measure(_: str) -> dict[str, Any]:
        seconds, loss = timed(step, device)
        on_gpu = device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(device) if on_gpu else peak_resident_bytes()
        return {**facts, "seconds": seconds, "loss": loss, "peak": peak, "before": 0 if on_gpu else start}

    return measure


def compare(
    args: argparse.Namespace, name: str, paths: list[str], lengths: list[int], block_size: int
) -> list[dict[str, Any]]:
    """Measure paths on the same samples; the first one is what the others are compared with."""
    on_gpu = torch.device(args.device).type == "cuda"
    runs: dict[str, list[dict[str, Any]]] = {path: [] for path in paths}
    if on_gpu:  # one model at a time: two need not fit
        for path in paths:
            measure = build_step(args, path, lengths, block_size)
            runs[path] = [measure("step") for _ in range(args.repeat)]
            del measure
            gc.collect()
            torch.cuda.empty_cache()
    else:
        workers = {path: Forked(partial(build_step, args, path, lengths, block_size)) for path in paths}
        for _ in range(args.repeat):
            for path, worker in workers.items():
                runs[path].append(worker.ask("step"))
        for worker in workers.values():
            worker.close()
    config, rows = bard_config(args.shape, block_size), []
    known_peak = peak_flops(torch.cuda.get_device_name(), args.dtype) if on_gpu else None
    for path, measured in runs.items():
        one, seconds = measured[0], statistics.median(run["seconds"] for run in measured)
        flops = training_flops(
            config,
            [(args.prompt_tokens, (length - args.prompt_tokens) // 2) for length in lengths],
            block_size=block_size,
            image_tokens=args.image_tokens,
            supervised=one["supervised"],
        ).model
        peak = max(run["peak"] for run in measured)
        rows.append(
            {
                "comparison": name,
                "path": path,
                "length": max(lengths),
                "block_size": block_size,
                "attention": one["attention"],
                "positions": one["positions"],
                "real_tokens": one["real_tokens"],
                "supervised": one["supervised"],
                "ms": 1000 * seconds,
                "all_ms": [1000 * run["seconds"] for run in measured],
                "supervised_per_second": one["supervised"] / seconds,
                "peak_mib": peak / 2**20,
                "peak_above_start_mib": (peak - one["before"]) / 2**20,
                "tflops": flops / seconds / 1e12,
                "mfu": flops / seconds / known_peak if known_peak else None,
                "loss": one["loss"],
            }
        )
        rows[-1]["time_ratio"] = rows[-1]["ms"] / rows[0]["ms"]
        rows[-1]["memory_ratio"] = rows[-1]["peak_mib"] / rows[0]["peak_mib"]
    check_losses(rows, args.dtype)
    print(table(rows, COLUMNS), flush=True)  # noqa: T201
    print(flush=True)  # noqa: T201
    return rows


def check_losses(rows: list[dict[str, Any]], dtype: str) -> None:
    """End the program unless all paths give the same loss (relative 1e-4 in float32, 2e-2 in bfloat16)."""
    tolerance = LOSS_TOLERANCE if dtype == "float32" else 2e-2  # bfloat16 logits have 8 bits
    for row in rows[1:]:
        if abs(row["loss"] - rows[0]["loss"]) > tolerance * max(1.0, abs(rows[0]["loss"])):
            raise SystemExit(
                f"error: the paths {rows[0]['path']} and {row['path']} gave different losses on the same noise:"
                f" {rows[0]['loss']:.6f} and {row['loss']:.6f}"
            )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time and memory against length, one line for each path and block size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for axis, key, title in zip(axes, ("ms", "peak_mib"), ("ms per step", "peak memory, MiB"), strict=True):
        for name in sorted({(row["path"], row["block_size"]) for row in rows}, reverse=True):
            line = sorted((row["length"], row[key]) for row in rows if (row["path"], row["block_size"]) == name)
            axis.plot(*zip(*line, strict=True), marker="o", label=f"{name[0]}, B = {name[1]}")
        axis.set(xlabel="tokens of a plain row", ylabel=title, ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Measure and report."""
    args = parse_args(argv)
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    rows, packing = [], []
    for block_size in args.block_sizes:
        for length in args.lengths:
            rows += compare(args, "plain and ours", args.paths, [length], block_size)
        if args.packing:
            step = (max(args.lengths) - args.prompt_tokens) // args.packing // 2 * 2
            shorter = [args.prompt_tokens + step * (index + 1) for index in range(args.packing)]
            packing += compare(args, "packing", ["unpacked", "packed"], shorter, block_size)
    payload = {
        **environment(torch.device(args.device), getattr(torch, args.dtype)),
        **{key: getattr(args, key) for key in ("shape", "prompt_tokens", "image_tokens", "loss_chunk_tokens")},
        "activation_checkpointing": args.activation_checkpointing,
        "memory": "allocator" if args.device.startswith("cuda") else "VmHWM of a process per path",
        "rows": rows + packing,
    }
    path = write_results(f"train_step_{args.shape}_{torch.device(args.device).type}", args.output, payload)
    plot(rows, path.with_suffix(".png"))
    print(f"written to {path} and {path.with_suffix('.png')}")  # noqa: T201


if __name__ == "__main__":
    main()
