"""Decoding speed: the autoregressive source, a plain block decoder and ours, in one run on the same weights.

    python benchmarks/decode.py                          # a shape that a CPU can measure
    python benchmarks/decode.py --shape 4b --settings 32:8 --dtype bfloat16   # on a GPU
    python benchmarks/decode.py --checkpoint DIR

Paths:
    ar           transformers' generate
    ar_static    transformers' generate with cache_implementation="static", which compiles itself on a GPU
    ar_graph     a static cache and one captured CUDA graph for each token (_rival.py)
    ar_compiled  the same with torch.compile's kernels inside the graph
    plain        what the reference implementation does: separate commit forwards, LM head and softmax at every position of
                 every forward, the prompt's included, a concatenated cache
    ours         the engine that generate() chooses by itself
and the name of any engine. The floor is the time it takes to read the weights and the cache of one forward once at the
measured copy bandwidth.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from _measure import PeakMemory, copy_bandwidth, count_syncs, device_seconds, timed
from _models import add_arguments, bard_config, image_prompt, on_device, random_model
from _report import Results, Row, environment, one_line, table
from _rival import StaticDecoder, autoregressive, greedy
from torch import Tensor
from transformers.utils import logging as hf_logging

from nemo_bard import BardVLForConditionalGeneration
from nemo_bard.generation.parameters import ENGINES

AUTOREGRESSIVE = ("ar", "ar_static", "ar_graph", "ar_compiled")
OURS = "ours"
COLUMNS = {
    "path": "path|s",
    "batch": "batch|d",
    "block_size": "B|d",
    "denoising_steps": "steps/block|d",
    "tpf": "TPF|.2f",
    "ms_per_step": "ms/step|.2f",
    "floor_ms": "floor ms|.2f",
    "idle_ms": "idle ms|.2f",
    "syncs_per_step": "syncs/step|.2f",
    "tokens_per_second": "tok/s|.1f",
    "decode_tokens_per_second": "decode tok/s|.1f",
    "times_plain": "x plain|.2f",
    "times_ar": "x ar|.2f",
    "tpf_for_3x_ar": "TPF for 3x ar|.2f",
    "agreement": "agreement|.3f",
    "peak_mib": "peak MiB|.0f",
    "warm_up_seconds": "warm-up s|.1f",
    "seconds": "seconds|.2f",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    add_arguments(parser)
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint folder instead of random weights")
    parser.add_argument(
        "--settings", nargs="+", default=["8:2", "32:8"], metavar="B:STEPS", help="block size and steps"
    )
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1])
    parser.add_argument("--paths", nargs="+", choices=(*AUTOREGRESSIVE, OURS, *ENGINES), help="what is compared")
    parser.add_argument("--strategy", default="low_confidence_static")
    parser.add_argument("--threshold", type=float, default=0.5, help="confidence threshold of the dynamic strategy")
    parser.add_argument("--prompt-tokens", type=int, default=960 if on_gpu else 514)
    parser.add_argument("--image-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=128)
    args = parser.parse_args(argv)
    if args.paths is None:
        graphed = ["ar_graph", "ar_compiled"] if args.device.startswith("cuda") else []
        args.paths = ["ar", *graphed, "plain", OURS]
    return args


def build_model(args: argparse.Namespace) -> BardVLForConditionalGeneration:
    """The model of the command line; nothing ends its answers but their length, since random ones must not end early."""
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    if args.checkpoint:
        model = BardVLForConditionalGeneration.from_pretrained(args.checkpoint, dtype=dtype).to(device)
    else:
        model = random_model(bard_config(args.shape, 8), device=device, dtype=dtype, seed=args.seed)
        model.config.block_size = None
    model.config.eos_token_id = None
    return model.eval()


class Candidate:
    """One row of the table: how it decodes, and what it has measured so far."""

    def __init__(self, row: Row, build: Callable[[], Callable[[], Row]], device: torch.device) -> None:
        """Keep what tells the row apart, and what makes ``decode``: a call that decodes once and returns facts."""
        self.row, self.build, self.device = row, build, device
        self.runs: list[Row] = []
        self.found: Row = {}
        self.peak = 0
        self.failed: str | None = None

    def attempt(self, part: Callable[[], None]) -> None:
        """Do a part unless an earlier one failed; an error ends this row alone."""
        if self.failed is None:
            try:
                part()
            except Exception as error:
                self.failed = one_line(error)
                sys.stderr.write(f"failed: {self.row}: {self.failed}\n")

    def warm_up(self) -> None:
        """Decode twice: allocator, threads, compiled code, captured graphs."""

        def twice() -> None:
            self.decode = self.build()
            self.decode()
            self.decode()

        self.found["warm_up_seconds"] = timed(twice, self.device)[0]

    def run(self) -> None:
        """Decode once and keep the figures."""
        with PeakMemory(self.device) as memory:
            self.runs.append(self.decode())
        self.peak = max(self.peak, memory.bytes)

    def look(self) -> None:
        """Count synchronisations, and compare the wall clock with the time that the device is busy."""
        steps, median = self.median["steps"], self.median
        syncs = count_syncs(self.decode, self.device)
        if syncs is not None:
            self.found["syncs_per_step"] = syncs / steps
        many_kernels = self.row["path"] in ("ar", "ar_static")  # of which the profiler would take long to tell
        busy = None if many_kernels else device_seconds(self.decode, self.device)
        if busy is not None:
            self.found["idle_ms"] = 1000 * max(median["seconds"] - busy, 0.0) / steps

    @property
    def median(self) -> Row:
        """The run of median time."""
        return sorted(self.runs, key=lambda run: run["seconds"])[len(self.runs) // 2]

    def result(self) -> Row:
        """The row with its figures, and with the reason if something failed."""
        row = {**self.row, **self.found}
        if self.runs:
            run = self.median
            row |= {key: value for key, value in run.items() if key != "ids"}
            row["tokens_per_second"] = run["tokens"] / run["seconds"]
            row["decode_tokens_per_second"] = 1000 * row["batch"] * run["tpf"] / run["ms_per_step"]
            row["peak_mib"] = self.peak / 2**20
        return row if self.failed is None else {**row, "failed": self.failed}


def decode_autoregressively(model: Any, path: str, batch: dict[str, Tensor], new_tokens: int) -> Callable[[], Row]:
    """Return what decodes once; the first token is the prompt's, the time of the others is that of a step."""
    rows, length = batch["input_ids"].shape
    device = batch["input_ids"].device
    if path in ("ar_graph", "ar_compiled"):
        decoder = StaticDecoder(model, rows=rows, capacity=length + new_tokens, compiled=path == "ar_compiled")
        generate = decoder.generate
    else:
        how = {"cache_implementation": "static"} if path == "ar_static" else {}

        def generate(batch: dict[str, Tensor], tokens: int) -> Tensor:
            return greedy(model, batch, tokens, **how)

    def decode() -> Row:
        first, _ = timed(lambda: generate(batch, 1), device)
        seconds, ids = timed(lambda: generate(batch, new_tokens), device)
        return {
            "seconds": seconds,
            "steps": new_tokens,
            "ms_per_step": 1000 * (seconds - first) / (new_tokens - 1),
            "tokens": rows * new_tokens,
            "tpf": 1.0,
            "ids": ids.tolist(),
        }

    return decode


def decode_blocks(
    model: BardVLForConditionalGeneration, path: str, batch: dict[str, Tensor], **settings: Any
) -> Callable[[], Row]:
    """Return what decodes once; the first step is the prompt's, the time of the others is that of a step."""
    device = batch["input_ids"].device
    if path != OURS:
        settings["decode_path"] = path

    def decode() -> Row:
        seconds, out = timed(lambda: model.generate(batch, return_dict_in_generate=True, **settings), device)
        steps = int(out.block_step_counts.amax(0).sum())
        return {
            "seconds": seconds,
            "steps": steps,
            "ms_per_step": 1000 * out.seconds["decode"] / max(steps - 1, 1),
            "tokens": int(out.lengths.sum()),
            "tpf": float(out.tokens_per_denoising_forward.mean()),
            "forwards": out.forwards,
            "split": out.seconds,
            "ids": out.sequences.tolist(),
        }

    return decode


def floor_seconds(bard: BardVLForConditionalGeneration, bandwidth: float, rows: int, tokens: int) -> float:
    """Time to read the text model, the LM head and a cache of ``tokens`` tokens per row."""
    text = bard.model.language_model
    weights = [p for name, p in text.named_parameters() if "embed_tokens" not in name] + [bard.lm_head.weight]
    config = bard.config.text_config
    cache = 2 * rows * tokens * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return (sum(p.numel() * p.element_size() for p in weights) + cache * weights[0].element_size()) / bandwidth


def agreement(ids: list[list[int]], expected: list[list[int]]) -> float:
    """Mean share of a row before its first other id."""
    shares = []
    for row, other in zip(ids, expected, strict=True):
        same = [a == b for a, b in zip(row, other, strict=False)]
        shares.append((same.index(False) if False in same else len(same)) / max(len(row), len(other)))
    return sum(shares) / len(shares)


def compare(candidates: list[Candidate], oracle: Candidate | None, dtype: str) -> None:
    """Say how far the ids are the oracle's; in float32 other ids are a failure."""
    if oracle is None or not oracle.runs:
        return
    expected = oracle.runs[0]["ids"]
    for candidate in candidates:
        if candidate is not oracle and candidate.runs:
            candidate.found["agreement"] = agreement(candidate.runs[0]["ids"], expected)
            if dtype == "float32" and candidate.runs[0]["ids"] != expected:
                candidate.failed = f"other ids than {oracle.row['path']} in float32"


def measure(
    args: argparse.Namespace, model: BardVLForConditionalGeneration, batch_size: int, bandwidth: float
) -> list[Row]:
    """The rows of one batch size."""
    device = torch.device(args.device)
    shape = {"rows": batch_size, "prompt_tokens": args.prompt_tokens, "image_tokens": args.image_tokens}
    prompt = image_prompt(model.config, **shape, seed=args.seed)
    batch = on_device(prompt, device, getattr(torch, args.dtype))
    source = autoregressive(model)
    rivals = [
        Candidate(
            {"path": path, "batch": batch_size},
            lambda path=path: decode_autoregressively(source, path, batch, args.new_tokens),
            device,
        )
        for path in args.paths
        if path in AUTOREGRESSIVE
    ]
    settings = {
        "max_new_tokens": args.new_tokens,
        "remasking_strategy": args.strategy,
        "confidence_threshold": args.threshold,
    }
    groups = []
    for block_size, steps in (map(int, setting.split(":")) for setting in args.settings):
        how = {**settings, "block_size": block_size, "denoising_steps": steps}
        row = {"batch": batch_size, "block_size": block_size, "denoising_steps": steps}
        groups.append(
            [
                Candidate(
                    {"path": path, **row}, lambda path=path, how=how: decode_blocks(model, path, batch, **how), device
                )
                for path in args.paths
                if path not in AUTOREGRESSIVE
            ]
        )
    everyone = [*rivals, *(candidate for group in groups for candidate in group)]
    for candidate in everyone:
        candidate.attempt(candidate.warm_up)
    for _ in range(args.repeat):
        for candidate in everyone:
            candidate.attempt(candidate.run)
    for candidate in everyone:
        candidate.attempt(candidate.look)
    for group in (rivals, *groups):
        oracle = next((one for one in group if one.row["path"] in ("ar", "plain")), None)
        compare(group, oracle, args.dtype)
    floor = floor_seconds(model, bandwidth, batch_size, args.prompt_tokens + args.new_tokens // 2)
    return relate([one.result() for one in everyone], 1000 * floor)


def relate(rows: list[Row], floor_ms: float) -> list[Row]:
    """Add how each row stands to the plain path of its setting, to the best autoregressive one, and to the floor."""
    best = min((row["ms_per_step"] for row in rows if row["path"] in AUTOREGRESSIVE and "tpf" in row), default=None)
    for row in (row for row in rows if "tpf" in row):
        row["floor_ms"] = floor_ms
        plain = [
            other
            for other in rows
            if other["path"] == "plain" and "tpf" in other and other.get("block_size") == row.get("block_size")
        ]
        if plain:
            row["times_plain"] = row["tokens_per_second"] / plain[0]["tokens_per_second"]
        if best is not None:
            row["times_ar"] = row["tpf"] * best / row["ms_per_step"]
            if row["path"] not in AUTOREGRESSIVE:
                row["tpf_for_3x_ar"] = 3 * row["ms_per_step"] / best
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure and report; 1 if a row failed."""
    args = parse_args(argv)
    hf_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="block_size=")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    model = build_model(args)
    bandwidth = copy_bandwidth(device)
    facts = {
        **environment(device, getattr(torch, args.dtype)),
        "copy_bandwidth_gb_s": bandwidth / 1e9,
        "shape": str(args.checkpoint or args.shape),
        **{key: getattr(args, key) for key in ("prompt_tokens", "image_tokens", "new_tokens", "strategy")},
    }
    name = args.checkpoint.name if args.checkpoint else args.shape
    results = Results(f"decode_{name}_{device.type}", args.output, COLUMNS, facts)
    for batch_size in args.batch_sizes:
        rows = measure(args, model, batch_size, bandwidth)
        results.add(*rows)
        sys.stdout.write(f"{table(rows, COLUMNS)}\n\n")
    sys.stdout.write(f"written to {results.path}\n")
    return int(any("failed" in row for row in results.rows))


if __name__ == "__main__":
    sys.exit(main())
