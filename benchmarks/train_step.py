"""One training step: a plain path and ours in one run on the same weights, samples and noise; packed and unpacked.

    python benchmarks/train_step.py                                       # the shape `cpu`, float32, length 1538
    python benchmarks/train_step.py --shape 4b --rows 2048 4096 8192      # on a GPU

A step is the forward and backward of all its samples, without an optimizer. Paths:
    plain         what the reference implementation does: the whole clean response and its padding are laid out, the mask is
                  dense and made on the CPU for each sample, logits are computed in float32 at all positions
    unpacked      the recipe's own code (PBMObjective, batch_loss), one row a sample
    packed        the same, all samples in one row
    packed_dense  the same with a dense mask instead of flex_attention's block mask, on a GPU
All must give the same loss. `--lengths` compares plain and unpacked at one sample of so many tokens, and packed with
unpacked at several shorter ones; `--rows` compares rows of so many tokens that samples of about `--sample-tokens` fill.
Without a GPU every path lives in a forked process, and its memory is the operating system's peak of that process; on a GPU
it is the allocator's.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch
import torch.nn.functional as F
from _measure import Forked, count_syncs, device_seconds, peak_resident_bytes, resident_bytes, timed
from _models import add_arguments, bard_config, image_prompt, on_device, random_model
from _report import Results, Row, attempt, environment, table
from torch import Tensor

from nemo_bard import BardVLConfig, BardVLForConditionalGeneration
from nemo_bard.cost.count import (
    DTYPE_BYTES,
    activation_memory,
    count_parameters,
    peak_flops,
    training_flops,
)
from nemo_bard.data.collate import BlockDiffusionCollator, TrainingSample, lay_out_sample
from nemo_bard.method.corruption import NoiseContext, corrupt_batch
from nemo_bard.method.layout import PADDING, sample_layout
from nemo_bard.method.losses import BlockDiffusionCrossEntropy
from nemo_bard.method.objectives import PBMObjective, count
from nemo_bard.method.schedule import NoiseSettings
from nemo_bard.train.forward import batch_loss
from nemo_bard.train.masks import FLEX_TILE, dense_mask, uses_flex
from nemo_bard.upstream import cpu as cpu_compat

LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Relative; bfloat16 logits have 8 bits."""
COLUMNS = {
    "comparison": "comparison|s",
    "path": "path|s",
    "length": "length|d",
    "samples": "samples|d",
    "block_size": "B|d",
    "positions": "positions|d",
    "ms": "ms/step|.0f",
    "time_ratio": "time x|.2f",
    "supervised_per_second": "sup tok/s|.0f",
    "peak_mib": "peak MiB|.0f",
    "predicted_mib": "predicted MiB|.0f",
    "memory_ratio": "mem x|.2f",
    "tflops": "TFLOP/s|.3f",
    "mfu": "MFU|.3f",
    "idle_ms": "idle ms|.1f",
    "syncs": "syncs|d",
    "loss": "loss|.6f",
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Samples of one optimizer step."""

    name: str
    length: int
    """Tokens of the longest plain row, or of the packed row."""
    samples: tuple[tuple[int, int], ...]
    """Prompt and response tokens of each."""
    paths: tuple[str, ...]
    """What is compared; the first one is what the others are compared with."""
    block_size: int
    padded: int = 1
    """A packed row is padded to a multiple of this."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument(
        "--lengths", nargs="*", type=int, help="tokens of a plain row: the prompt and twice the response; 1538 on a CPU"
    )
    parser.add_argument("--rows", nargs="*", type=int, help="tokens of packed rows; 2048 4096 8192 on a GPU")
    parser.add_argument("--sample-tokens", type=int, default=900, help="tokens of a sample of --rows, about")
    parser.add_argument("--block-sizes", nargs="+", type=int, default=[8])
    parser.add_argument("--prompt-tokens", type=int, default=514)
    parser.add_argument("--image-tokens", type=int, default=256, help="image tokens of a prompt; 0 for none")
    parser.add_argument(
        "--packing", type=int, default=4, help="samples of the comparison beside --lengths; 0 leaves it out"
    )
    parser.add_argument("--loss-chunk-tokens", type=int, help="default: the recipe's")
    parser.add_argument("--activation-checkpointing", action="store_true")
    args = parser.parse_args(argv)
    if args.lengths is None and args.rows is None:
        on_gpu = args.device.startswith("cuda")
        args.lengths, args.rows = ([], [2048, 4096, 8192]) if on_gpu else ([1538], [])
    args.lengths, args.rows = args.lengths or [], args.rows or []
    for length in (*args.lengths, *args.rows):
        if length < args.prompt_tokens + 2 * max(args.block_sizes):
            parser.error(f"{length} tokens leave no response behind --prompt-tokens {args.prompt_tokens}")
    return args


def make_cases(args: argparse.Namespace) -> list[Case]:
    """What the command line asks for."""
    cases, prompt = [], args.prompt_tokens
    for block_size in args.block_sizes:
        for length in args.lengths:
            sample = (prompt, (length - prompt) // 2)
            cases.append(
                Case(
                    name="plain and ours",
                    length=length,
                    samples=(sample,),
                    paths=("plain", "unpacked"),
                    block_size=block_size,
                )
            )
        if args.lengths and args.packing:
            step = (max(args.lengths) - prompt) // args.packing // 2
            samples = tuple((prompt, step * (index + 1)) for index in range(args.packing))
            length = prompt + 2 * samples[-1][1]
            cases.append(
                Case(
                    name="packing",
                    length=length,
                    samples=samples,
                    paths=("unpacked", "packed"),
                    block_size=block_size,
                )
            )
        dense = ("packed_dense",) if args.device.startswith("cuda") else ()
        for length in args.rows:
            number = max(1, length // args.sample_tokens)
            sample = (prompt, (length // number - prompt - block_size) // 2)  # its row fills its share of the length
            cases.append(
                Case(
                    name="rows",
                    length=length,
                    samples=(sample,) * number,
                    paths=("plain", "unpacked", "packed", *dense),
                    block_size=block_size,
                    padded=length,
                )
            )
    return cases


def make_samples(args: argparse.Namespace, config: BardVLConfig, case: Case, *, plain: bool) -> list[TrainingSample]:
    """Random single-turn samples of a case."""
    collator, samples = BlockDiffusionCollator(None, config), []
    for index, (start, size) in enumerate(case.samples):
        prompt = image_prompt(
            config, rows=1, prompt_tokens=start, image_tokens=args.image_tokens, seed=args.seed + index
        )
        block = config.block_size
        generator = torch.Generator().manual_seed(args.seed + index)
        text = torch.randint(10, config.vision_start_token_id - 10, (size - 1,), generator=generator)
        end = config.eos_token_id
        padding = -size % block if plain else 0
        ids = torch.cat([prompt["input_ids"][0], text, torch.tensor([end] * (1 + padding))])
        stop = len(ids)
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
    args: argparse.Namespace, config: BardVLConfig, case: Case, path: str, *, tile: int
) -> list[dict[str, Any]]:
    """Corrupted and weighed microbatches of one optimizer step: one per sample, or one packed row.

    Rows are padded to multiples of a ``tile``, as the recipe does for flex_attention.
    """
    samples = make_samples(args, config, case, plain=path == "plain")
    packed = path.startswith("packed")
    rows = [samples] if packed else [[sample] for sample in samples]
    collator = BlockDiffusionCollator(None, config, pad_to_multiple_of=math.lcm(tile, case.padded if packed else 1))
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


def build_model(args: argparse.Namespace, config: BardVLConfig) -> BardVLForConditionalGeneration:
    """The model that all paths train."""
    model = random_model(config, device=torch.device(args.device), dtype=getattr(torch, args.dtype), seed=args.seed)
    if args.activation_checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def build_step(
    args: argparse.Namespace, case: Case, path: str, model: BardVLForConditionalGeneration | None = None
) -> Callable[[str], Row]:
    """Build the microbatches of a path (and a model, unless there is one), warm up, and return what measures a step.

    The result takes ``step`` (one forward and backward of all microbatches) or ``look`` (what the host does).
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    if path != "plain":
        cpu_compat.apply()  # as the recipe does
    start = resident_bytes()
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    config = bard_config(args.shape, case.block_size)
    if model is None:
        model = build_model(args, config)
    dense = path == "plain" or (on_gpu and path == "packed_dense")
    model.set_attn_implementation("sdpa" if dense else "bard")  # on a CPU the backend `bard` takes dense masks
    flex = uses_flex(model.config, device)
    model.config.block_size = case.block_size
    batches = make_batches(args, config, case, path, tile=FLEX_TILE if flex else 1)
    moved = [on_device(batch, device, getattr(torch, args.dtype)) for batch in batches]
    objective = PBMObjective(BlockDiffusionCrossEntropy())

    def loss_of(batch: dict[str, Any]) -> Tensor:
        if path == "plain":
            return plain_loss(model, batch)
        return batch_loss(model, model.config, objective, batch, chunk_tokens=args.loss_chunk_tokens)[0]

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        losses = []
        for batch in moved:
            loss = loss_of(batch)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    step()  # warm-up: allocator, threads, compiled code
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    longest = max(batch["input_ids"].numel() for batch in batches)
    images = max(len(batch["image_grid_thw"]) if args.image_tokens else 0 for batch in batches)
    facts = {
        "attention": "flex" if flex else "dense",
        "positions": sum(batch["input_ids"].numel() for batch in batches),
        "real_tokens": sum(int((batch["sample_ids"] != PADDING).sum()) for batch in batches),
        "supervised": sum(len(batch["output_positions"]) for batch in batches),
        "predicted": predicted_bytes(args, config, longest, images * args.image_tokens, dense=not flex),
    }

    def measure(what: str) -> Row:
        if what == "look":
            return {"syncs": count_syncs(step, device), "busy": device_seconds(step, device)}
        seconds, loss = timed(step, device)
        peak = torch.cuda.max_memory_allocated(device) if on_gpu else peak_resident_bytes()
        return {**facts, "seconds": seconds, "loss": float(loss), "peak": peak, "before": 0 if on_gpu else start}

    return measure


def predicted_bytes(
    args: argparse.Namespace, config: BardVLConfig, tokens: int, image_tokens: int, *, dense: bool
) -> float:
    """Peak memory of a microbatch by ``nemo_bard.cost``: ``weights + max(activations + head gradient, gradients)``.

    Weights and gradients have the benchmark's dtype; the sum of the LM head's gradient is float32.
    """
    width, parameters = DTYPE_BYTES[args.dtype], count_parameters(config)
    activations = activation_memory(
        config,
        tokens=tokens,
        image_tokens=image_tokens,
        width=width,
        checkpointing=args.activation_checkpointing,
        dense_mask=dense,
    )
    head = 4 * (parameters.head or parameters.embedding)
    return width * parameters.total + max(activations.total + head, width * parameters.total)


def measure_on_gpu(args: argparse.Namespace, case: Case, path: str, model: BardVLForConditionalGeneration) -> Row:
    """Steps of one path on a model that all paths share."""
    try:
        measure = build_step(args, case, path, model)
        runs = [measure("step") for _ in range(args.repeat)]
        return figures(args, case, runs, measure("look") if path.startswith("packed") else {})
    finally:
        model.zero_grad(set_to_none=True)


def measure_forked(args: argparse.Namespace, case: Case) -> list[Row]:
    """Interleaved steps of all paths, each in a process of its own."""
    workers = {path: Forked(partial(build_step, args, case, path)) for path in case.paths}
    runs: dict[str, list[Row]] = {path: [] for path in case.paths}
    for _ in range(args.repeat):
        for path, worker in workers.items():
            runs[path].append(worker.ask("step"))
    for worker in workers.values():
        worker.close()
    return [{**labels(case, path), **figures(args, case, runs[path], {})} for path in case.paths]


def labels(case: Case, path: str) -> Row:
    """What tells a row apart."""
    return {
        "comparison": case.name,
        "path": path,
        "length": case.length,
        "samples": len(case.samples),
        "block_size": case.block_size,
    }


def figures(args: argparse.Namespace, case: Case, runs: list[Row], looked: Row) -> Row:
    """The figures of a row from its measured steps."""
    one, seconds = runs[0], statistics.median(run["seconds"] for run in runs)
    config, device = bard_config(args.shape, case.block_size), torch.device(args.device)
    flops = training_flops(
        config,
        case.samples,
        block_size=case.block_size,
        image_tokens=args.image_tokens,
        supervised=one["supervised"],
    ).model
    peak = max(run["peak"] for run in runs)
    known = peak_flops(torch.cuda.get_device_name(device), args.dtype) if device.type == "cuda" else None
    busy = looked.get("busy")
    return {
        **{key: one[key] for key in ("attention", "positions", "real_tokens", "supervised", "loss")},
        "ms": 1000 * seconds,
        "all_ms": [1000 * run["seconds"] for run in runs],
        "supervised_per_second": one["supervised"] / seconds,
        "peak_mib": peak / 2**20,
        "peak_above_start_mib": (peak - one["before"]) / 2**20,
        "predicted_mib": one["predicted"] / 2**20,
        "tflops": flops / seconds / 1e12,
        "mfu": flops / seconds / known if known else None,
        "syncs": looked.get("syncs"),
        "idle_ms": None if busy is None else 1000 * max(seconds - busy, 0.0),
    }


def relate(args: argparse.Namespace, rows: list[Row]) -> list[Row]:
    """Add how each row stands to the first one that ran; a row with another loss has failed."""
    ran = [row for row in rows if "ms" in row]
    for row in ran:
        row["time_ratio"] = row["ms"] / ran[0]["ms"]
        row["memory_ratio"] = row["peak_mib"] / ran[0]["peak_mib"]
        expected = ran[0]["loss"]
        if abs(row["loss"] - expected) > LOSS_TOLERANCE[args.dtype] * max(1.0, abs(expected)):
            row["failed"] = f"loss {row['loss']:.6f}, but {ran[0]['path']} has {expected:.6f} on the same noise"
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time and memory against length, one line for each path and block size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for axis, key, title in zip(axes, ("ms", "peak_mib"), ("ms per step", "peak memory, MiB"), strict=True):
        for name in sorted({(row["path"], row["block_size"]) for row in rows}, reverse=True):
            same = [row for row in rows if (row["path"], row["block_size"]) == name]
            line = sorted((row["length"], row[key]) for row in same)
            axis.plot(*zip(*line, strict=True), marker="o", label=f"{name[0]}, B = {name[1]}")
        axis.set(xlabel="tokens of a row", ylabel=title, ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Measure and report; 1 if a row failed."""
    args = parse_args(argv)
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    cases = make_cases(args)
    facts = {
        **environment(device, getattr(torch, args.dtype)),
        **{key: getattr(args, key) for key in ("shape", "prompt_tokens", "image_tokens", "loss_chunk_tokens")},
        "activation_checkpointing": args.activation_checkpointing,
        "memory": "allocator" if on_gpu else "VmHWM of a process per path",
    }
    results = Results(f"train_step_{args.shape}_{device.type}", args.output, COLUMNS, facts)
    model = build_model(args, bard_config(args.shape, cases[0].block_size)) if on_gpu else None
    for case in cases:
        if model is None:
            rows = measure_forked(args, case)
        else:
            rows = []
            for path in case.paths:
                rows.append(attempt(labels(case, path), partial(measure_on_gpu, args, case, path, model)))
                gc.collect()
                torch.cuda.empty_cache()
        rows = relate(args, rows)
        results.add(*rows)
        sys.stdout.write(f"{table(rows, COLUMNS)}\n\n")
        sys.stdout.flush()
    picture = results.path.with_suffix(".png")
    plot([row for row in results.rows if "ms" in row and row["comparison"] != "packing"], picture)
    sys.stdout.write(f"written to {results.path} and {picture}\n")
    return int(any("failed" in row for row in results.rows))


if __name__ == "__main__":
    sys.exit(main())
