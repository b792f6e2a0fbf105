"""The whole way on one machine: ``python -m nemo_bard.cli.demo`` (``make demo``).

Runs the pipeline ``bard_tiny`` on real images of handwritten digits: a tiny Qwen3-VL learns to read them token by token (the
stand-in for a Qwen3-VL checkpoint), is converted, trained as a block-diffusion model at block size 4, 8, 16 and 32, and
distilled from its own stage with block size 4. Another model keeps the next-token ability beside blocks of 8, and reads token
by token and, with the same answers, by drafting blocks and verifying them. Every stage reads held-out digits. At the end there are a table, a report
and a picture. Interrupted, it goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from nemo_bard.base.errors import EXIT_USER_ERROR, USER_ERRORS, one_line
from nemo_bard.base.metrics import markdown_table
from nemo_bard.base.paths import find_recipe
from nemo_bard.report.run import read_run, score_rows, scores_of, training_rows

ORDER = (
    "tiny", "source", "causal", "joint_b8", "speculative_b8",
    "start", "pbm_b4", "pbm_b8", "pbm_b16", "pbm_b32", "swd_b32",
)  # fmt: skip
"""The chain's stages, and those of the model that also reads token by token."""
STAGES = ("source", "joint_b8", "pbm_b4", "pbm_b8", "pbm_b16", "pbm_b32", "swd_b32")
SMALL = (
    *(f"stage.{name}.max_steps=2" for name in STAGES),
    *(f"stage.{name}.{key}_batch_size=2" for name in STAGES for key in ("global", "local")),
    *(f"stage.{name}.warmup_steps=1" for name in STAGES),
    "evaluation.limit=2",
)
"""Overrides of ``--small``."""


def say(text: str) -> None:
    """Write a line for the reader."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def run_chain(output: Path, overrides: Sequence[str]) -> int:
    """Print the command, run it, and return its exit code."""
    words = ["finetune", "--config", str(find_recipe("bard_tiny")), f"run_dir={output}", *overrides]
    say(f"$ automodel {shlex.join(words)}\n")
    # One thread: the model is tiny, and several threads stall whenever something else uses the cores.
    environment = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **os.environ}
    return subprocess.run([sys.executable, "-m", "nemo_bard.cli", *words], check=False, env=environment).returncode


def summary(output: Path) -> str:
    """What came out, as text: what the stages read, what training took, and what to do next.

    Raises:
        ValueError: If ``output`` is no run directory.
    """
    records = read_run(output)
    scored = scores_of(records)
    last = output / records[-1].manifest["export"]
    return (
        f"{markdown_table(*score_rows(scored))}\n\n{markdown_table(*training_rows(records))}\n\n"
        f"{scored[0]['num_samples']} held-out images, one at a time.\n"
        f"Report: {output / 'report.html'}   Answers, by denoising step: {output / 'answers.png'}\n"
        f"Try it: nemo-bard generate --model {last} --image YOUR.png --prompt 'Read the digits.'"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m nemo_bard.cli.demo",
        description="The whole way on one machine: trains a tiny model on handwritten digits.",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="folder for everything (default: runs/demo)"
    )
    parser.add_argument("--small", action="store_true", help="a few steps only: checks the way, learns nothing")
    args, overrides = parser.parse_known_args(argv)
    start = time.perf_counter()
    try:
        order = (f"order=[{','.join(ORDER)}]", "stage.start.init=source")
        code = run_chain(args.output, [*order, *(SMALL if args.small else ()), *overrides])
        if code:
            return code
        say(f"\n{summary(args.output)}\n{(time.perf_counter() - start) / 60:.1f} minutes")
    except USER_ERRORS as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
