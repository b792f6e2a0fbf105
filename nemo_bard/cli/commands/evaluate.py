"""``nemo-bard evaluate --model DIR --data X``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_bard.checkpoints.folder import check_checkpoint
from nemo_bard.cli import options

if TYPE_CHECKING:
    from nemo_bard.evaluation.evaluate import EvalResult

DATA_HELP = "file or folder of any layout, prepared folder, or digits:SPLIT[,key=value...] such as digits:test,rows=2"
SCORER_HELP = (
    "exact_match, accuracy, a dotted path package.module.function(prediction, reference), or several joined by commas"
    " (default: the data set's own, else exact_match,accuracy)"
)


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the parser of ``evaluate``."""
    parser = subparsers.add_parser(
        "evaluate",
        help="score a checkpoint on a data set, with its speed",
        description="Generate an answer to every sample (the last assistant turn is the reference), score it and measure"
        " the speed. A Qwen3-VL folder is decoded token by token, for comparison.",
    )
    options.add_model_flags(parser)
    parser.add_argument("--data", required=True, help=DATA_HELP)
    parser.add_argument("--limit", type=options.positive, metavar="N", help="first N samples only")
    parser.add_argument("--batch-size", type=options.positive, default=8, metavar="N", help="(default: 8)")
    parser.add_argument("--scorer", help=SCORER_HELP)
    parser.add_argument("--output", type=Path, metavar="JSON", help="write everything, every sample included")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file if it exists")
    parser.add_argument("--seed", type=int, default=0, help="for temperature > 0 (default: 0)")
    options.add_decoding_flags(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Check the input, then load, evaluate, print and write."""
    check_checkpoint(args.model, args.dtype)
    from nemo_bard.data.readers import open_dataset
    from nemo_bard.evaluation.evaluate import evaluate, resolve_scorer
    from nemo_bard.evaluation.responder import load_checkpoint

    config = options.read_generation_config(args.model, options.given_settings(args), device=args.device)
    if args.output is not None:
        options.writable_file(args.output, overwrite=args.overwrite)
    dataset = open_dataset(args.data, limit=args.limit)
    scorer = resolve_scorer(args.scorer, dataset)

    import torch

    torch.manual_seed(args.seed)
    model, processor = load_checkpoint(args.model, device=args.device, dtype=args.dtype)
    result = evaluate(
        model,
        processor,
        dataset,
        generation_config=config,
        batch_size=args.batch_size,
        limit=args.limit,
        scorer=scorer,
    )
    sys.stdout.write(report(result))
    if args.output is not None:
        result.save(args.output)
        sys.stdout.write(f"wrote {args.output}\n")
    return 0


def report(result: EvalResult) -> str:
    """Write the aggregates as lines of text."""
    rows = [(name.replace("_", " "), f"{100 * value:.2f} %") for name, value in result.scores.items()]
    rows += [
        ("samples", f"{result.num_samples}"),
        ("response tokens", f"{result.num_tokens}"),
        ("tokens per forward", f"{result.tpf:.2f} ({result.tpf_with_commits:.2f} with commits)"),
        ("tokens per second", f"{result.tokens_per_second:.1f}"),
        ("forwards", f"{result.forwards}"),
        ("seconds", f"{result.seconds:.2f}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "".join(f"{name:<{width}}  {value}\n" for name, value in rows)
