"""``nemo-bard generate``: one prompt, or a file of prompts."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_bard.checkpoints.folder import check_checkpoint
from nemo_bard.cli import options
from nemo_bard.generation.adapter_folders import ADAPTER_WEIGHTS, FOLDER

if TYPE_CHECKING:
    from nemo_bard.evaluation.batch import PromptLine
    from nemo_bard.generation.settings import BardGenerationConfig

PAGE_SUFFIXES = (".html", ".htm", ".gif")
SAME_IDS_ENGINES = ("fast", "plain")
"""Engines that give the same tokens."""
_EPILOG = """\
A line of a --batch file is {"prompt": "...", "images": ["a.png"], "videos": [], "system": "...", "id": "..."} or
{"messages": [...], "images": [...]} as in training data, where a last assistant turn is left out. An output line has id,
text, num_tokens, tpf (response tokens per denoising forward) and key. Lines come in the order of the prompts. Run the
same command again after a cut: finished lines are kept, a half-written last one is done again.
"""


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the parser of ``generate``."""
    parser = subparsers.add_parser(
        "generate",
        help="answer a prompt, or a file of prompts",
        description="Answer a prompt with images or videos, or a JSONL file of prompts.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_model_flags(parser)
    one = parser.add_argument_group("one prompt")
    one.add_argument("--prompt", help="the text; <image> and <video> in it place the files, else they come first")
    one.add_argument("--image", action="append", default=[], metavar="FILE", help="an image; may be repeated")
    one.add_argument("--video", action="append", default=[], metavar="FILE", help="a video; may be repeated")
    one.add_argument("--system", help="text of a system turn")
    one.add_argument("--stream", action="store_true", help="print while decoding; on a terminal with drafts")
    one.add_argument("--stats", action="store_true", help="print tokens, forwards and seconds to stderr")
    one.add_argument(
        "--visualize", type=Path, metavar="FILE", help="write the denoising, step by step, as .html or .gif"
    )
    many = parser.add_argument_group("a file of prompts")
    many.add_argument("--batch", type=Path, metavar="JSONL", help="prompts, one JSON object a line; see below")
    many.add_argument("--output", type=Path, metavar="JSONL", help="answers; an unfinished file is continued")
    many.add_argument("--batch-size", type=options.positive, default=8, metavar="N", help="(default: 8)")
    many.add_argument("--root-dir", type=Path, metavar="DIR", help="where relative paths start (default: by the file)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --output or --visualize")
    parser.add_argument("--seed", type=int, default=0, help="for temperature > 0 (default: 0)")
    options.add_decoding_flags(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Check everything that can be checked without the model, the cheapest first, then load it and answer."""
    from nemo_bard.data.conversation import open_media
    from nemo_bard.evaluation.batch import make_conversation

    check_combination(args)
    check_checkpoint(args.model, args.dtype, block_diffusion=True)
    settings = options.given_settings(args)
    if args.batch is not None:
        return answer_file(args, options.read_generation_config(args.model, settings, device=args.device))
    conversation = make_conversation(args.prompt, images=args.image, videos=args.video, system=args.system)
    check_media(conversation)
    conversation = open_media(conversation)
    return answer_one(args, options.read_generation_config(args.model, settings, device=args.device), conversation)


def check_combination(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not go together."""
    if (args.prompt is None) == (args.batch is None):
        raise ValueError("give either --prompt TEXT or --batch FILE")
    if args.batch is None:
        unfit = [("--output", args.output), ("--root-dir", args.root_dir)]
        other = "--batch"
    else:
        if args.output is None:
            raise ValueError("--batch needs --output FILE")
        check_batch_paths(args)
        unfit = [
            (f"--{name}", getattr(args, name)) for name in ("image", "video", "stream", "stats", "visualize", "system")
        ]
        other = "--prompt"
    for name, value in unfit:
        if value not in (None, False, []):
            raise ValueError(f"{name} goes with {other} only")
    if args.visualize is not None:
        if args.visualize.suffix.lower() not in PAGE_SUFFIXES:
            raise ValueError(f"--visualize must end in {', '.join(PAGE_SUFFIXES)}, got {args.visualize}")
        options.writable_file(args.visualize, overwrite=args.overwrite)


def check_batch_paths(args: argparse.Namespace) -> None:
    """Raise ValueError unless the prompts exist and the answers can be written beside them."""
    if not args.batch.is_file():
        raise ValueError(f"prompt file {args.batch} does not exist")
    if args.output.resolve() == args.batch.resolve():
        raise ValueError(f"--output {args.output} is the file of the prompts")
    if args.root_dir is not None and not args.root_dir.is_dir():
        raise ValueError(f"--root-dir {args.root_dir} is not a folder")
    options.writable_file(args.output, overwrite=True)


def answer_one(args: argparse.Namespace, config: BardGenerationConfig, conversation: list[dict[str, Any]]) -> int:
    """Answer ``--prompt``."""
    import torch

    from nemo_bard.data.encode import encode_prompts
    from nemo_bard.evaluation.responder import answers_of, load_checkpoint

    torch.manual_seed(args.seed)
    model, processor = load_checkpoint(args.model, device=args.device, dtype=args.dtype)
    batch = encode_prompts(processor, [conversation]).to(model.device)
    config = config.updated(return_dict_in_generate=True, output_history=args.visualize is not None)
    streamer = make_streamer(processor.tokenizer) if args.stream else None
    output = model.generate(batch, generation_config=config, streamer=streamer)
    answer = answers_of(output, processor)[0]
    if not args.stream:
        sys.stdout.write(answer.text + "\n")
        sys.stdout.flush()
    if args.stats:
        total = sum(output.seconds.values())
        phases = ", ".join(f"{name} {value:.2f}" for name, value in output.seconds.items())
        sys.stderr.write(
            f"{answer.num_tokens} tokens in {answer.denoising_forwards} denoising and {answer.commit_forwards} commit"
            f" forwards: {answer.tpf:.2f} tokens per forward ({answer.tpf_with_commits:.2f} with commits),"
            f" {answer.num_tokens / total:.1f} tokens/s, {total:.2f} s ({phases})\n"
        )
    if args.visualize is not None:
        from nemo_bard.report.trace import make_trace
        from nemo_bard.report.visualize import write_visualization

        trace = make_trace(output, processor.tokenizer, conversation=conversation)
        write_visualization(trace, args.visualize)
        sys.stderr.write(f"wrote {args.visualize}\n")
    return 0


def make_streamer(tokenizer: Any) -> Any:
    """Return transformers' streamer for stdout: with drafts that are overwritten on a terminal, plain elsewhere."""
    from transformers import TextDiffusionStreamer, TextStreamer

    kind = TextDiffusionStreamer if sys.stdout.isatty() else TextStreamer
    return kind(tokenizer, skip_prompt=True, skip_special_tokens=True)


def check_media(conversation: list[dict[str, Any]]) -> None:
    """Raise ValueError for a file that is missing or no image, and for a video that nothing installed can read."""
    from nemo_bard.data.conversation import media_of

    for item in media_of(conversation):
        item.check()
        if item.kind == "video":
            from nemo_bard.data.video import find_decoder

            find_decoder()


def answer_file(args: argparse.Namespace, config: BardGenerationConfig) -> int:
    """Answer ``--batch`` into ``--output``."""
    from nemo_bard.evaluation.batch import finished_lines, read_prompts
    from nemo_bard.evaluation.responder import BlockDiffusionResponder, load_checkpoint

    prompts = read_prompts(args.batch, run_key(args, config), root_dir=args.root_dir)
    for prompt in prompts:
        check_media(prompt.conversation)
    done, size = (0, 0) if args.overwrite else finished_lines(args.output, prompts)
    if done == len(prompts):
        sys.stdout.write(f"{args.output}: all {done} lines were finished before\n")
        return 0
    model, processor = load_checkpoint(args.model, device=args.device, dtype=args.dtype)
    with args.output.open("ab") as file:
        file.truncate(size)
    if done:
        sys.stderr.write(f"{args.output}: {done} of {len(prompts)} lines were finished before\n")
    _answer_batches(args, prompts, done, BlockDiffusionResponder(model, processor, config))
    sys.stdout.write(f"wrote {args.output}: {len(prompts)} lines\n")
    return 0


def run_key(args: argparse.Namespace, config: BardGenerationConfig) -> str:
    """Return what the answers depend on beside the prompt."""
    files = [*args.model.glob("*.safetensors")]
    if config.adapter is not None:
        files.append(args.model / FOLDER / config.adapter / ADAPTER_WEIGHTS)
    weights = sorted((file.name, file.stat().st_size) for file in files)
    same_ids = ["cache_implementation", "compile_step"]  # these change how, not what
    if config.resolve()[0].decode_path in SAME_IDS_ENGINES:
        same_ids.append("decode_path")
    fields = options.decoding_fields(config.remasking_strategy)
    settings = {name: getattr(config, name) for name in fields if name not in same_ids}
    seed = args.seed if config.temperature > 0 else None
    return json.dumps([str(args.model.resolve()), weights, settings, args.dtype, seed], sort_keys=True, default=str)


def _answer_batches(args: argparse.Namespace, prompts: list[PromptLine], done: int, responder: Any) -> None:
    import torch
    from tqdm import tqdm

    from nemo_bard.data.conversation import open_media
    from nemo_bard.evaluation.batch import append_lines

    with tqdm(total=len(prompts), initial=done, desc="generating", unit="prompt", disable=None) as bar:
        for start in range(done, len(prompts), args.batch_size):
            chunk = prompts[start : start + args.batch_size]
            conversations = []
            for prompt in chunk:
                try:
                    conversations.append(open_media(prompt.conversation))
                except ValueError as error:
                    raise ValueError(f"{args.batch}:{prompt.line}: {error}") from error
            torch.manual_seed(args.seed + start)  # so that a continued run draws as an uncut one would
            batch = responder.answer(conversations)
            append_lines(
                args.output,
                [
                    {
                        "id": prompt.id,
                        "text": answer.text,
                        "num_tokens": answer.num_tokens,
                        "tpf": round(answer.tpf, 4),
                        "key": prompt.key,
                    }
                    for prompt, answer in zip(chunk, batch.answers, strict=True)
                ],
            )
            bar.update(len(chunk))
