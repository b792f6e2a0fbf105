"""``nemo-bard data show PATH``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_bard.cli import options

if TYPE_CHECKING:
    from nemo_bard.data.collate import BlockDiffusionCollator
    from nemo_bard.data.survey.survey import Survey

ROWS = 2000
"""Rows of each source that are looked at."""
PATH_HELP = "a prepared folder, a file or folder of any layout, or NAME:... of a reader"


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the parser of ``data show``."""
    parser = subparsers.add_parser(
        "show",
        help="tell what a data set is like: sources, draws, lengths, what max_length leaves out, samples",
        description="Tell rows, draws and epochs of each source, what was left out, how long and how large samples are, what"
        " max_length keeps and what blocks cost in padding. A seeded part of the rows is looked at; shares of the whole come"
        " with their 95 % margins.",
    )
    parser.add_argument("path", metavar="PATH", help=PATH_HELP)
    parser.add_argument("--model", metavar="DIR", help="checkpoint (folder or hub name) whose processor counts tokens")
    parser.add_argument(
        "--block-size", type=options.positive, metavar="N", help="tokens per block (default: the model's, else 4)"
    )
    parser.add_argument("--turns", choices=("all", "last"), default="all", help="supervised turns (default: all)")
    parser.add_argument("--max-length", type=options.positive, metavar="N", help="tell of this one too")
    parser.add_argument(
        "--rows",
        type=_rows,
        default=ROWS,
        metavar="N",
        help=f"rows of each source to look at, or all (default: {ROWS})",
    )
    parser.add_argument("--seed", type=int, default=0, help="which rows and samples (default: 0)")
    parser.add_argument("--jobs", type=options.positive, default=1, metavar="N", help="processes (default: 1)")
    raw = parser.add_argument_group("raw data")
    raw.add_argument("--layout", metavar="NAME", help="(default: by its columns)")
    raw.add_argument("--split", metavar="NAME", help="which of its files")
    raw.add_argument("--root-dir", metavar="DIR", help="where relative paths of images start (default: its folder)")
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--samples",
        type=options.positive,
        metavar="N",
        help="of the run (default: what repetitions give; with weights, as many as rows)",
    )
    run.add_argument(
        "--weights", type=_numbers, metavar="A=X,B=Y", help="sources to draw from, with their shares in any unit"
    )
    run.add_argument(
        "--repetitions", type=_numbers, metavar="A=X,B=Y", help="sources to draw from, and how often each row comes"
    )
    run.add_argument(
        "--config", type=Path, metavar="YAML", help="a recipe, or a data section of a chain, that says all of this"
    )
    out = parser.add_argument_group("output")
    out.add_argument("--html", type=Path, metavar="FILE", help="write a page with samples, in one file")
    out.add_argument("--png", type=Path, metavar="FILE", help="write the histograms")
    out.add_argument(
        "--examples", type=options.positive, default=6, metavar="N", help="samples on the page (default: 6)"
    )
    out.add_argument("--overwrite", action="store_true", help="replace output files that exist")
    out.add_argument("--json", action="store_true", help="print JSON")
    parser.error = options.raise_error
    return parser


def _rows(text: str) -> int | None:
    return None if text == "all" else options.positive(text)


def _numbers(text: str) -> dict[str, float]:
    """``a=2,b=1`` as a mapping."""
    weights: dict[str, float] = {}
    for word in text.split(","):
        name, _, value = word.rpartition("=")
        if name in weights:
            raise argparse.ArgumentTypeError(f"{name} is given twice")
        try:
            weights[name] = float(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"must be SOURCE=NUMBER,..., got {word!r}") from error
        if not name:
            raise argparse.ArgumentTypeError(f"must be SOURCE=NUMBER,..., got {word!r}")
    return weights


def run(args: argparse.Namespace) -> int:
    """Look, and tell."""
    for path in (args.html, args.png):
        if path is not None:
            options.writable_file(path, overwrite=args.overwrite)
    from nemo_bard.upstream.console import hush

    hush()
    import torch

    from nemo_bard.data.survey.draws import plan_draws
    from nemo_bard.data.survey.measure import measure
    from nemo_bard.data.survey.sources import open_sources
    from nemo_bard.data.survey.survey import SourceSurvey, Survey, as_dict

    torch.set_num_threads(1)  # tensors of one sample are small: more threads only wait for each other
    _read_config(args)
    sources = open_sources(_spec(args))
    draws = plan_draws(sources, Path(args.path), asked=_asked(args), samples=args.samples)
    collator = _collator(args)
    surveys = []
    for number, source in enumerate(sources):
        seen = measure(source, collator, most=args.rows, seed=args.seed + number, jobs=args.jobs)
        surveys.append(SourceSurvey(source=source, measured=seen, draws=draws[source.name]))
    survey = Survey(
        sources=surveys,
        block_size=None if collator is None else collator.block_size,
        turns=args.turns,
        max_length=args.max_length,
        run_samples=sum(one.samples for one in draws.values()),
    )
    _write(args, survey, collator)
    if args.json:
        sys.stdout.write(json.dumps({"path": args.path, **as_dict(survey)}, indent=2) + "\n")
        return 0
    from nemo_bard.report.data.text import render

    options.write_out(render(survey, plain=not can_show_blocks(sys.stdout)))
    for path in (args.html, args.png):
        if path is not None:
            sys.stdout.write(f"wrote {path}\n")
    return 0


def _read_config(args: argparse.Namespace) -> None:
    """Fill in what the command line leaves to ``--config``."""
    if args.config is None:
        return
    from nemo_bard.data.survey.draws import read_run

    said = read_run(args.config)
    if said.path is not None and Path(said.path).resolve() != Path(args.path).resolve():
        raise ValueError(f"--config {args.config} is about {said.path}, PATH is {args.path}")
    args.config_sources = said.sources
    args.samples = said.samples if args.samples is None else args.samples
    if args.model is not None and args.max_length is None:
        args.max_length = said.max_length


def _asked(args: argparse.Namespace) -> dict[str, dict[str, float]] | None:
    """What is to be drawn, as a mixture's ``sources``; None if nothing is said."""
    if args.weights and args.repetitions:
        raise ValueError("--weights and --repetitions exclude each other")
    for key, given in (("weight", args.weights), ("repetitions", args.repetitions)):
        if given:
            return {name: {key: value} for name, value in given.items()}
    return getattr(args, "config_sources", None)


def _spec(args: argparse.Namespace) -> Any:
    """What is to be opened: the path, or with options of raw data a section of them."""
    raw = {name: getattr(args, name) for name in ("layout", "split", "root_dir") if getattr(args, name) is not None}
    if raw and Path(args.path, "manifest.json").is_file():
        raise ValueError(f"--{next(iter(raw)).replace('_', '-')} is of raw data, {args.path} is a prepared folder")
    return {"_target_": "rows", "path": args.path, **raw} if raw else args.path


def _collator(args: argparse.Namespace) -> BlockDiffusionCollator | None:
    """What counts tokens; None without a model."""
    if args.model is None:
        for name in ("block_size", "max_length"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} needs --model, whose processor counts tokens")
        return None
    from nemo_bard.data.survey.processor import load_collator

    return load_collator(args.model, block_size=args.block_size, turns=args.turns)


def can_show_blocks(stream: Any) -> bool:
    """Whether a stream is a terminal that can show block characters."""
    try:
        "\u2581\u2588".encode(stream.encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return False
    return stream.isatty()


def _write(args: argparse.Namespace, survey: Survey, collator: BlockDiffusionCollator | None) -> None:
    """Write the picture and the page that were asked for, each whole or not at all."""
    from nemo_bard.base.files import write_bytes, write_text

    if args.png is not None:
        from nemo_bard.report.data.pictures import draw_histograms

        write_bytes(args.png, draw_histograms(survey))
    if args.html is None:
        return
    from nemo_bard.report.data.page import render_page
    from nemo_bard.report.data.pictures import DARK, draw_histograms
    from nemo_bard.report.data.samples import pick_samples

    samples = pick_samples([one.source for one in survey.sources], collator, number=args.examples, seed=args.seed)
    page = render_page(
        survey,
        samples,
        title=Path(args.path).name or args.path,
        pictures=(draw_histograms(survey), draw_histograms(survey, DARK)),
        context_attention="block" if collator is None else collator.config.context_attention,
    )
    write_text(args.html, page)
