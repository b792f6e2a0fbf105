"""Serving: tokens/s, time to the first block, latencies and equal answers of an OpenAI endpoint at 1 to 64 clients.

python benchmarks/serve.py --url http://127.0.0.1:8000                     # a server that runs, samples of digits
python benchmarks/serve.py --start DIR --rival SOURCE --python PATH        # vLLM of that Python, one after the other
python benchmarks/serve.py --url URL --data mine.jsonl --max-tokens 128    # own images and questions

The answers of one client are what those of more clients have to be; one client is therefore always measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from _clients import Answer, Endpoint, ask_all, compare, figures
from _report import Results, Row, attempt, environment, table
from _serve_plot import plot
from _serve_prompts import Prompts, make_bodies, read_prompts, read_reference, write_prompts
from _servers import free_port, server_command, serving
from tqdm import tqdm

from nemo_bard.base.errors import USER_ERRORS, not_one_of, one_line

COLUMNS = {
    "server": "server|s",
    "clients": "clients|d",
    "requests": "requests|d",
    "errors": "errors|d",
    "tokens_per_second": "tok/s|.1f",
    "times_rival": "x rival|.2f",
    "tpf": "TPF|.2f",
    "first_p50_ms": "first ms, p50|.0f",
    "first_p99_ms": "p99|.0f",
    "between_p50_ms": "between ms, p50|.1f",
    "between_p99_ms": "p99|.1f",
    "latency_p50_ms": "latency ms, p50|.0f",
    "latency_p99_ms": "p99|.0f",
    "pieces": "pieces|.1f",
    "solo_equal": "equal to solo|d",
    "solo_compared": "of|d",
    "reference_equal": "equal to reference|d",
    "reference_compared": "of|d",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    server = parser.add_argument_group("server")
    server.add_argument("--url", help="a server that runs")
    server.add_argument("--model", help="its model; the first one that it serves")
    server.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="or OPENAI_API_KEY")
    server.add_argument("--start", type=Path, metavar="DIR", help="checkpoint to serve with vLLM")
    server.add_argument("--rival", type=Path, metavar="DIR", help="checkpoint to compare with, served before it")
    server.add_argument("--python", default=sys.executable, metavar="PATH", help="a Python that has vLLM")
    server.add_argument("--server-args", default="", metavar="TEXT", help="further arguments of vLLM, for both")
    server.add_argument("--start-timeout", type=float, default=900, metavar="S", help="until a server must be ready")
    asked = parser.add_argument_group("requests")
    asked.add_argument("--data", default="digits:test", help="any data set, as of nemo-bard evaluate")
    asked.add_argument("--prompts", type=Path, metavar="JSONL", help="instead: prompts of nemo-bard generate --batch")
    asked.add_argument("--reference", type=Path, metavar="JSONL", help="answers of nemo-bard generate to --prompts")
    asked.add_argument("--write-prompts", type=Path, metavar="JSONL", help="write the samples as prompts, and end")
    asked.add_argument("--samples", type=positive, default=64, help="different prompts")
    asked.add_argument("--clients", type=positive, nargs="+", default=[1, 8, 32, 64], metavar="N")
    asked.add_argument("--per-client", type=positive, default=2, metavar="N", help="least requests of a client")
    asked.add_argument("--warm-up", type=int, default=1, metavar="N", help="requests of a client that do not count")
    asked.add_argument("--max-tokens", type=positive, default=64)
    asked.add_argument("--temperature", type=float, default=0.0, help="above 0 each prompt has a seed of its own")
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--xargs", type=json.loads, default={}, metavar="JSON", help="decode settings, not the rival's")
    asked.add_argument("--tokenizer", type=Path, metavar="DIR", help="counts tokens instead of the server's usage")
    asked.add_argument("--timeout", type=float, default=600, metavar="S", help="in which a server must say something")
    parser.add_argument("--exact", action="store_true", help="exit code 1 if answers differ, as they may in bfloat16")
    parser.add_argument("--output", type=Path, help="result file; the plot is beside it")
    args = parser.parse_args(argv)
    check_args(parser, args)
    args.clients = sorted({1, *args.clients})
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with one line for options that do not go together."""
    if args.write_prompts is None and (args.url is None) == (args.start is None):
        parser.error("give either --url or --start")
    if args.rival is not None and args.start is None:
        parser.error("--rival goes with --start")
    if args.reference is not None and args.prompts is None:
        parser.error("--reference goes with --prompts, the file that was answered; --write-prompts makes one")
    if args.warm_up < 0:
        parser.error(f"--warm-up must be at least 0, got {args.warm_up}")
    if not isinstance(args.xargs, dict):
        parser.error(f"--xargs must be a JSON object, got {args.xargs!r}")
    for name in ("start", "rival"):
        folder = getattr(args, name)
        if folder is not None and not (folder / "config.json").is_file():
            parser.error(f"--{name} {folder} is no checkpoint: it has no config.json")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return int(text)


# ------------------ measuring ------------------
def token_counter(tokenizer: Path | None) -> Callable[[Answer], int]:
    """How response tokens of an answer are counted: by the server's usage, or by a tokenizer."""
    if tokenizer is not None:
        from transformers import AutoTokenizer

        encoder = AutoTokenizer.from_pretrained(tokenizer)
        return lambda answer: len(encoder.encode(answer.text, add_special_tokens=False))

    def by_usage(answer: Answer) -> int:
        if answer.tokens is None:
            raise ValueError("the server tells no usage; give --tokenizer DIR to count tokens")
        return answer.tokens

    return by_usage


@dataclass
class Benchmark:
    """What all servers are asked."""

    args: argparse.Namespace
    prompts: Prompts
    results: Results
    count: Callable[[Answer], int]
    reference: dict[int, str] | None

    def measure(self, name: str, endpoint: Endpoint, xargs: dict[str, Any]) -> None:
        """All levels of a server.

        Raises:
            ConnectionError: If it does not answer at all.
            ValueError: If it has no such model.
        """
        models = endpoint.models()
        model = self.args.model or models[0]
        if model not in models:
            raise not_one_of("--model", model, models)
        bodies, solo = make_bodies(self.args, self.prompts, model, xargs), {}
        for clients in self.args.clients:
            row = attempt({"server": name, "clients": clients}, partial(self.level, clients, endpoint, bodies, solo))
            self.results.add({**row, **self.times_rival(row)})

    def level(self, clients: int, endpoint: Endpoint, bodies: list[bytes], solo: dict[int, Any]) -> Row:
        """Figures at a number of clients; one client fills ``solo``."""
        requests = max(len(bodies), clients * self.args.per_client)
        asking = partial(ask_all, endpoint, bodies, clients=clients)
        warm_up = [index % len(bodies) for index in range(clients * self.args.warm_up)]
        asyncio.run(asking(order=warm_up, tick=lambda: None))
        with tqdm(total=requests, desc=f"{clients} clients", unit="answer", leave=False, disable=None) as bar:
            order = [index % len(bodies) for index in range(requests)]
            before = endpoint.denoising_steps()
            answers = asyncio.run(asking(order=order, tick=bar.update))
            after = endpoint.denoising_steps()
        if clients == 1:
            solo.update({answer.index: answer.outcome for answer in answers if answer.error is None})
        row = {**figures(answers, self.count), **compare(answers, solo, lambda answer: answer.outcome, "solo")}
        if before is not None and after is not None and after > before and not row["errors"]:
            row["tpf"] = row["tokens"] / (after - before)
        if self.reference is not None:
            row.update(compare(answers, self.reference, lambda answer: answer.text, "reference"))
        return row

    def times_rival(self, row: Row) -> Row:
        """Its tokens/s over the rival's."""
        same = [
            one["tokens_per_second"]
            for one in self.results.rows
            if one["server"] == "rival" and one["clients"] == row["clients"] and one.get("tokens_per_second")
        ]
        return {"times_rival": row["tokens_per_second"] / same[0]} if same and "tokens_per_second" in row else {}


def started(args: argparse.Namespace, name: str, folder: Path, log: Path) -> tuple[Endpoint, Any]:
    """A server of our own: where it will be, and what runs it for a ``with`` block."""
    port = free_port()
    endpoint = Endpoint(f"http://127.0.0.1:{port}", None, args.timeout)
    command = server_command(args.python, folder, port, shlex.split(args.server_args))
    sys.stderr.write(f"{name}: {shlex.join(command)}\n")
    return endpoint, serving(command, endpoint, log, args.start_timeout)


def servers(args: argparse.Namespace, results: Path) -> Iterator[tuple[str, Endpoint, Any, dict[str, Any]]]:
    """Names, addresses, what runs them and decode settings, one after the other."""
    if args.url is not None:
        yield "server", Endpoint(args.url, args.api_key, args.timeout), contextlib.nullcontext(), args.xargs
    for name, folder, xargs in (("rival", args.rival, {}), ("bard", args.start, args.xargs)):
        if folder is not None:
            log = results.with_suffix(f".{name}.log")
            yield name, *started(args, name, folder, log), xargs


def facts(args: argparse.Namespace) -> Row:
    """What holds for all rows."""
    here = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float32)
    asked = {"data": str(args.prompts or args.data), "max_tokens": args.max_tokens, "temperature": args.temperature}
    tokens = "tokenizer" if args.tokenizer else "usage"
    if args.api_key:
        here["command"] = here["command"].replace(args.api_key, "***")
    return {**here, "dtype": None, **asked, "seed": args.seed, "xargs": args.xargs, "tokens_by": tokens}


def run(args: argparse.Namespace) -> int:
    """Measure and report; 1 if a row failed or a request did, with ``--exact`` also if an answer was unequal."""
    prompts = read_prompts(args)
    if args.write_prompts is not None:
        write_prompts(args.write_prompts, prompts)
        return 0
    reference = read_reference(args.reference, prompts) if args.reference is not None else None
    results = Results(
        "serve", args.output, COLUMNS, {**facts(args), "prompts": len(prompts.ids), "versions_served": {}}
    )
    benchmark = Benchmark(args, prompts, results, token_counter(args.tokenizer), reference)
    for name, endpoint, running, xargs in servers(args, results.path):
        try:
            with running:
                results.facts["versions_served"][name] = endpoint.version()
                benchmark.measure(name, endpoint, xargs)
        except ConnectionError as error:
            sys.stderr.write(f"failed: {name}: {one_line(error)}\n")
            results.add({"server": name, "failed": one_line(error)})
    sys.stdout.write(table(results.rows, COLUMNS) + "\n")
    plot(results.rows, results.path.with_suffix(".png"))
    wrong = any("failed" in row or row["errors"] for row in results.rows)
    return int(wrong or (args.exact and any(unequal(row) for row in results.rows)))


def unequal(row: Row) -> bool:
    """Whether an answer is another than alone or in the reference."""
    return any(row.get(f"{name}_equal") != row.get(f"{name}_compared") for name in ("solo", "reference"))


def main(argv: list[str] | None = None) -> int:
    """Run; wrong input is one line, and SIGTERM ends started servers too."""
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return run(args)
    except USER_ERRORS as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
