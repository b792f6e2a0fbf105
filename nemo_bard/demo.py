"""The whole way on one machine: ``python -m nemo_bard.demo`` (``make demo``).

A tiny Qwen3-VL learns to read images of handwritten digits token by token (the stand-in for a Qwen3-VL checkpoint), is
converted, trained as a block-diffusion model at growing block sizes, and read back on held-out digits. Every command is
printed before it runs, so that it can be repeated by hand. At the end there are a table and a picture.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_bard.commands import EXIT_USER_ERROR, USER_ERRORS
from nemo_bard.paths import find_recipe

MARKER = "demo.json"
EXPORT = Path("LATEST/model/consolidated")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """How long the demo trains and what it measures."""

    output: Path
    source_steps: int
    stages: tuple[tuple[int, int, float], ...]
    """Block size, optimizer steps and peak learning rate of each stage, in order."""
    samples: int
    """Held-out images read by every model."""
    confidence_threshold: float = 0.9
    overrides: tuple[str, ...] = ()
    """Further overrides of the recipes."""


FULL = {"source_steps": 700, "stages": ((4, 300, 1.5e-3), (8, 200, 1.0e-3)), "samples": 256}
SMALL = {
    "source_steps": 3,
    "stages": ((4, 3, 1e-3), (8, 3, 1e-3)),
    "samples": 2,
    "overrides": (
        "lr_scheduler.lr_warmup_steps=1",
        "step_scheduler.global_batch_size=2",
        "step_scheduler.local_batch_size=2",
    ),
}


def say(text: str) -> None:
    """Write a line for the reader."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def run(title: str, words: list[str]) -> float:
    """Print a command, run it, and return its seconds.

    Raises:
        RuntimeError: If it fails.
    """
    say(f"\n== {title}\n$ {shlex.join(words)}")
    start = time.perf_counter()
    # One thread: the model is tiny, and several threads stall whenever something else uses the cores.
    environment = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **os.environ}
    code = subprocess.run([sys.executable, *words[1:]], check=False, env=environment).returncode
    if code:
        raise RuntimeError(f"{title} failed with exit code {code}: {shlex.join(words)}")
    seconds = time.perf_counter() - start
    say(f"== {title}: {seconds:.0f} s")
    return seconds


def prepare_folder(output: Path) -> None:
    """Make an empty output folder; an earlier demo's is replaced, anything else is left alone.

    Raises:
        ValueError: If the folder holds something that no demo made.
    """
    if output.is_dir() and any(output.iterdir()):
        if not (output / MARKER).is_file():
            raise ValueError(f"{output} is not empty and not an earlier demo's; choose another --output")
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).write_text("{}\n")


def train(config: DemoConfig) -> dict[str, float]:
    """Train and convert everything; returns the seconds of each step."""
    out = config.output
    python = ["python", "-m"]
    finetune = [*python, "nemo_bard.cli", "finetune", "--config"]
    seconds = {"tiny": run("a tiny Qwen3-VL checkpoint", [*python, "nemo_bard.tiny", str(out / "tiny")])}
    seconds["source"] = run(
        "the source learns to read, token by token",
        [
            *finetune,
            str(find_recipe("digits_source")),
            f"model.pretrained_model_name_or_path={out / 'tiny'}",
            f"checkpoint.checkpoint_dir={out / 'source'}",
            f"step_scheduler.max_steps={config.source_steps}",
            *config.overrides,
        ],
    )
    previous = out / "start"
    first_block = config.stages[0][0]
    seconds["convert"] = run(
        "conversion",
        [
            *python,
            "nemo_bard.cli",
            "convert",
            str(out / "source" / EXPORT),
            str(previous),
            "--block-size",
            str(first_block),
        ],
    )
    for block_size, steps, lr in config.stages:
        folder = out / f"b{block_size}"
        seconds[f"b{block_size}"] = run(
            f"block diffusion, B = {block_size}",
            [
                *finetune,
                str(find_recipe("digits_pbm")),
                f"model.pretrained_model_name_or_path={previous}",
                f"model.block_size={block_size}",
                f"checkpoint.checkpoint_dir={folder}",
                f"step_scheduler.max_steps={steps}",
                f"optimizer.lr={lr}",
                *config.overrides,
            ],
        )
        previous = folder / EXPORT
    return seconds


def measure(config: DemoConfig) -> list[dict[str, Any]]:
    """Read the held-out digits with the source and every stage; returns the rows of the table."""
    import torch
    from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

    from nemo_bard.configuration import BardGenerationConfig
    from nemo_bard.digits import make_digits
    from nemo_bard.evaluate import evaluate
    from nemo_bard.model import BardVLForConditionalGeneration
    from nemo_bard.visualize_picture import draw_answers

    torch.set_num_threads(1)  # as in training
    dataset = make_digits("test", config.samples)
    processor = AutoProcessor.from_pretrained(config.output / "tiny")
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    generation = BardGenerationConfig(
        max_new_tokens=64, confidence_threshold=config.confidence_threshold, eos_token_id=end
    )
    source = Qwen3VLForConditionalGeneration.from_pretrained(config.output / "source" / EXPORT, dtype=torch.float32)
    source.generation_config.eos_token_id = end
    rows = []
    stages: list[tuple[str, int, Any]] = [("source (autoregressive)", 1, source.eval())]
    for block_size, *_ in config.stages:
        folder = config.output / f"b{block_size}" / EXPORT
        stages.append((f"B = {block_size}", block_size, folder))
    say("\n== reading held-out digits")
    for name, block_size, where in stages:
        model = where
        if isinstance(where, Path):
            model = BardVLForConditionalGeneration.from_pretrained(where, dtype=torch.float32).eval()
        result = evaluate(
            model, processor, dataset, generation_config=generation, batch_size=1, warm_up=True, progress=True
        )
        result.save(config.output / f"eval_{'source' if block_size == 1 else f'b{block_size}'}.json")
        rows.append(
            {
                "stage": name,
                "block_size": block_size,
                **result.scores,
                "tpf": result.tpf,
                "tokens_per_second": result.tokens_per_second,
            }
        )
    by_steps = sorted(result.samples, key=lambda sample: sample.tpf)  # the last stage's; an easy answer takes one step
    shown = sorted({sample.sample_index for sample in (*by_steps[:3], by_steps[-1])})
    draw_answers(
        model,
        processor,
        [dataset[i] for i in shown],
        generation_config=generation,
        path=config.output / "answers.png",
    )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| stage | block size | exact match | digit accuracy | tokens per forward | tokens/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['stage']} | {row['block_size']} | {100 * row['exact_match']:.1f} % |"
            f" {100 * row['digit_accuracy']:.1f} % | {row['tpf']:.2f} | {row['tokens_per_second']:.0f} |"
        )
    return "\n".join(lines)


def parse_args(argv: list[str] | None) -> DemoConfig:
    """Command line of the demo."""
    parser = argparse.ArgumentParser(prog="python -m nemo_bard.demo", description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="folder for everything (default: runs/demo)"
    )
    parser.add_argument("--small", action="store_true", help="a few steps only: checks the way, learns nothing")
    args = parser.parse_args(argv)
    return DemoConfig(output=args.output, **(SMALL if args.small else FULL))


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    logging.basicConfig(level=logging.WARNING)
    start = time.perf_counter()
    try:
        config = parse_args(argv)
        prepare_folder(config.output)
        seconds = train(config)
        rows = measure(config)
    except (*USER_ERRORS, RuntimeError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return EXIT_USER_ERROR
    total = time.perf_counter() - start
    text = table(rows)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
    report = {"settings": settings, "seconds": {**seconds, "total": total}, "rows": rows}
    (config.output / MARKER).write_text(json.dumps(report, indent=2) + "\n")
    (config.output / "table.md").write_text(text + "\n")
    say(f"\n{text}\n")
    say(f"{config.samples} held-out images, one at a time. Picture: {config.output / 'answers.png'}")
    say(
        f"Try it: nemo-bard generate --model {config.output / f'b{config.stages[-1][0]}' / EXPORT} "
        "--image YOUR.png --prompt 'Read the digits.'"
    )
    say(f"{total / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
