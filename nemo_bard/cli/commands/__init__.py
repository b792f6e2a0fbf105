"""Subcommands of ``nemo-bard``, one module each, imported only when called.

A command module defines ``add_parser(subparsers) -> argparse.ArgumentParser``, which adds its own parser, and
``run(args) -> int``, which returns the exit code. It imports nothing heavy at module level. One that sets
``ACCEPTS_OVERRIDES = True`` gets what argparse did not know as ``args.overrides``, in the order of the command line;
everywhere else an unknown argument is an error. Adding a command takes one line in ``COMMANDS``.
"""

from __future__ import annotations

COMMANDS: dict[str, tuple[str, str]] = {
    "finetune": ("nemo_bard.cli.commands.finetune", "train from a recipe YAML (also: automodel finetune)"),
    "rehearse": (
        "nemo_bard.cli.commands.rehearse",
        "try a chain on the real machines in a few minutes, and measure it",
    ),
    "convert": ("nemo_bard.cli.commands.convert", "make a BARD start point from a Qwen3-VL folder"),
    "export": ("nemo_bard.cli.commands.export", "make a Hugging Face folder of any training checkpoint"),
    "merge": ("nemo_bard.cli.commands.merge", "add LoRA adapters to their base checkpoint"),
    "generate": ("nemo_bard.cli.commands.generate", "answer a prompt, or a file of prompts"),
    "serve": ("nemo_bard.cli.commands.serve", "serve a checkpoint with OpenAI's interface and a web page"),
    "evaluate": ("nemo_bard.cli.commands.evaluate", "score a checkpoint on a data set, with its speed"),
    "eval": ("nemo_bard.cli.commands.eval", "run public benchmarks through lmms-eval"),
    "calibrate": ("nemo_bard.cli.commands.calibrate", "find the fastest decoding setting within a tolerated loss"),
    "plan": ("nemo_bard.cli.commands.plan", "estimate memory, time per step and days of a training run"),
    "data": ("nemo_bard.cli.commands.data", "prepare, show and check data sets"),
    "settings": ("nemo_bard.cli.commands.settings", "list every setting with default, allowed values and meaning"),
    "status": ("nemo_bard.cli.commands.status", "tell how far a pipeline's run is"),
    "doctor": ("nemo_bard.cli.commands.doctor", "check the installation and say how to repair it"),
}
"""Command name -> (module, one line of help)."""
