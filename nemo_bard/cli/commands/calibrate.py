"""``nemo-bard calibrate --model DIR --data X``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_bard.base.folders import CONFIG
from nemo_bard.checkpoints.folder import check_checkpoint
from nemo_bard.cli import options
from nemo_bard.cli.commands.evaluate import DATA_HELP, SCORER_HELP
from nemo_bard.generation.adapter_folders import FACTS, adapter_folder
from nemo_bard.generation.parameters import STRATEGIES, calibrated_strategies, strategy_fields

if TYPE_CHECKING:
    from nemo_bard.evaluation.calibrate import Calibration

SHORT = {"confidence_threshold": "--thresholds"}
"""Other names of flags."""
_EPILOG = """\
Every combination of block size, strategy, steps and the strategy's parameters is measured, and the setting in use now. A setting is admitted if its score is at most --tolerance percentage points under that of the most accurate
setting, or under --baseline. Of these the fastest is chosen: by tokens per second as measured here (the default), or by
tokens per forward, which depends on no machine but leaves out that a larger block costs more. The folder of --output gets
calibration.json, calibration.png and generation_config.json. The model folder is changed with --write only, and then its
generation_config.json is kept as generation_config.before-calibration.json.
"""


def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Return a reader of ``a,b,c``."""

    def read(text: str) -> list[Any]:
        return [kind(word) for word in text.split(",")]

    read.__name__ = f"list of {kind.__name__}"
    return read


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the parser of ``calibrate``."""
    parser = subparsers.add_parser(
        "calibrate",
        help="find the fastest decoding setting within a tolerated loss",
        description="Measure accuracy and speed of many decoding settings and choose the fastest within a tolerated loss.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_model_flags(parser)
    parser.add_argument("--adapter", metavar="NAME", help="LoRA adapter of the folder, which is calibrated by itself")
    parser.add_argument("--data", required=True, help=DATA_HELP)
    parser.add_argument("--limit", type=options.positive, metavar="N", help="first N samples only")
    parser.add_argument("--batch-size", type=options.positive, default=8, metavar="N", help="(default: 8)")
    parser.add_argument("--scorer", help=f"{SCORER_HELP}; the first score counts")
    parser.add_argument(
        "--tolerance", type=float, default=0.5, help="tolerated loss in percentage points (default: 0.5)"
    )
    parser.add_argument("--baseline", type=float, metavar="SCORE", help="score in [0, 1] that the loss is counted from")
    parser.add_argument("--objective", default="tokens_per_second", help="tokens_per_second (default) or tpf")
    parser.add_argument("--block-sizes", type=listed(int), metavar="N,N", help="(default: the checkpoint's)")
    parser.add_argument(
        "--steps",
        type=listed(int),
        metavar="N,N",
        help="(default: the block size, and its halves for a strategy without parameters)",
    )
    tried = ",".join(calibrated_strategies())
    parser.add_argument("--strategies", type=listed(str), metavar="NAME,NAME", help=f"(default: {tried})")
    group = parser.add_argument_group("parameters of the strategies", "several values are joined by commas")
    fields, swept = {}, {}
    for name in STRATEGIES:  # where two have a parameter in common, the first one describes it
        fields |= {key: field for key, field in strategy_fields(name).items() if key not in fields}
        swept = {**STRATEGIES.get(name).swept, **swept}
    add_value_flags(group, fields, swept)
    options.follow_strategies(parser, "--strategies", lambda fields: add_value_flags(group, fields, {}))
    parser.add_argument(
        "--max-new-tokens",
        type=options.positive,
        metavar="N",
        help="while measuring; not written (default: the model's)",
    )
    parser.add_argument(
        "--repeats", type=options.positive, default=2, metavar="N", help="the fastest counts (default: 2)"
    )
    parser.add_argument("--output", type=Path, default=Path("calibration"), help="folder (default: calibration)")
    parser.add_argument("--overwrite", action="store_true", help="replace the results in the output folder")
    parser.add_argument("--write", action="store_true", help="put the choice into the model folder too")
    parser.add_argument("--seed", type=int, default=0, help="for temperature > 0 (default: 0)")
    return parser


def add_value_flags(group: Any, fields: Mapping[str, Field[Any]], swept: Mapping[str, Sequence[Any]]) -> None:
    """Add a flag for the values of each parameter."""
    for name, field in fields.items():
        words = [f"--{name.replace('_', '-')}", *([SHORT[name]] if name in SHORT else [])]
        values = ",".join(str(value) for value in swept[name]) if name in swept else "the model's"
        check = field.metadata["check"]
        group.add_argument(
            *words,
            dest=name,
            type=listed(check.parse),
            metavar=f"{check.metavar},{check.metavar}",
            help=f"{field.metadata['help']} (default: {values})",
        )


def given_values(args: argparse.Namespace) -> dict[str, list[Any]]:
    """Return the values of strategies' parameters that are on the command line."""
    names = {name for strategy in (*STRATEGIES, *(args.strategies or ())) for name in strategy_fields(strategy)}
    return {name: getattr(args, name) for name in sorted(names) if getattr(args, name) is not None}


def run(args: argparse.Namespace) -> int:
    """Check the input, then load, sweep, print and write."""
    check_checkpoint(args.model, args.dtype, block_diffusion=True)
    if find_spec("matplotlib") is None:
        raise ValueError("drawing the curve needs matplotlib; run `pip install matplotlib`")
    from nemo_bard.data.readers import open_dataset
    from nemo_bard.evaluation import calibrate
    from nemo_bard.evaluation.evaluate import resolve_scorer
    from nemo_bard.evaluation.responder import load_checkpoint

    goal = calibrate.Goal(tolerance=args.tolerance, objective=args.objective, baseline=args.baseline)
    chosen = {} if args.adapter is None else {"adapter": args.adapter}
    base = options.read_generation_config(args.model, chosen, device=args.device)
    place = args.model if args.adapter is None else adapter_folder(args.model, args.adapter)
    said = CONFIG if args.adapter is None else FACTS
    trained = json.loads((place / said).read_text(encoding="utf-8")).get("block_size")
    sizes = args.block_sizes
    if sizes is None:
        sizes = [base.block_size if base.block_size is not None else trained]
        if sizes == [None]:
            raise ValueError(f"{place / said} has no block_size; pass --block-sizes")
    grid = calibrate.make_grid(
        sizes,
        steps=args.steps,
        values=given_values(args),
        strategies=args.strategies,
    )
    check_output(args.output, overwrite=args.overwrite)
    dataset = open_dataset(args.data, limit=args.limit)
    scorer = resolve_scorer(args.scorer, dataset)

    import torch

    torch.manual_seed(args.seed)
    model, processor = load_checkpoint(args.model, device=args.device, dtype=args.dtype)
    result = calibrate.calibrate(
        model,
        processor,
        dataset,
        grid,
        goal,
        base=base,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        scorer=scorer,
        repeats=args.repeats,
    )
    sys.stdout.write(report(result))
    for file in calibrate.write_results(result, args.output):
        sys.stdout.write(f"wrote {file}\n")
    if args.write:
        backup = calibrate.write_into_model(result, place)
        kept = f" (the earlier one is {backup.name})" if backup is not None else ""
        sys.stdout.write(f"wrote {place / 'generation_config.json'}{kept}\n")
    return 0


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Raise ValueError if results can't go into ``folder`` without replacing something."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output {folder} is a file, a folder is needed")
    if (folder / "config.json").exists():
        raise ValueError(f"output {folder} is a model folder; give another --output and --write to change the model")
    taken = [
        name for name in ("calibration.json", "calibration.png", "generation_config.json") if (folder / name).exists()
    ]
    if taken and not overwrite:
        raise ValueError(f"output {folder / taken[0]} exists; pass --overwrite to replace it")


def report(result: Calibration) -> str:
    """Write the sweep as a table and the choice as a line."""
    width = max(len(str(point.setting)) for point in result.points)
    lines = [f"  {'setting':<{width}}  {result.metric:>14}  tokens/s  tokens/forward"]
    for point in sorted(result.points, key=lambda p: p.speed(result.goal.objective), reverse=True):
        mark = "*" if point is result.chosen else " "
        lines.append(
            f"{mark} {point.setting!s:<{width}}  {100 * point.score:>12.2f} %  {point.tokens_per_second:>8.1f}"
            f"  {point.tpf:>14.2f}"
        )
    source = "most accurate setting" if result.goal.baseline is None else "baseline"
    lines.append(
        f"chosen: {result.chosen.setting}, {100 * (result.reference - result.chosen.score):.2f} points under the"
        f" {source} ({100 * result.reference:.2f} %), tolerated {result.goal.tolerance:g}"
    )
    return "\n".join(lines) + "\n"
