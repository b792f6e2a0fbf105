"""``nemo-bard serve DIR``: with vLLM where it is, else with a small server for one user."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import shlex
import sys
from pathlib import Path

from nemo_bard.base.errors import not_one_of
from nemo_bard.base.settings import add_flags, given_flags
from nemo_bard.checkpoints.folder import check_checkpoint
from nemo_bard.cli import options
from nemo_bard.generation.adapter_folders import adapter_names
from nemo_bard.serving.limits import PIXELS_VARIABLE
from nemo_bard.serving.server.settings import KEY_VARIABLE, ServerSettings, key_from_environment
from nemo_bard.serving.vllm_command import has_vllm, vllm_command

ACCEPTS_OVERRIDES = True
ENGINES = ("auto", "vllm", "local")
NEEDED = ("fastapi", "prometheus_client", "uvicorn")
WITH_BOTH = ("host", "port", "served_model_name", "api_key", "allow_urls", "max_pixels")
"""Settings that vLLM's server has too."""
_EPILOG = """\
Where vLLM is installed its server is started, with the arguments behind -- as they are:
  nemo-bard serve DIR -- --max-num-seqs 32
Elsewhere a small server for one user answers one request at a time, with a web page at /. Both have /v1/chat/completions,
/v1/models, /health and /metrics, and take decode settings in "vllm_xargs"; images come as data: URLs. In the small server an
adapter of the folder (adapters/b32) is a model of its own, NAME:b32.
"""


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the parser of ``serve``."""
    parser = subparsers.add_parser(
        "serve",
        help="serve a checkpoint with OpenAI's interface and a web page",
        description="Serve a checkpoint with OpenAI's interface.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = options.raise_error
    parser.add_argument("model", metavar="DIR", type=Path, help="checkpoint folder")
    parser.add_argument("--engine", default="auto", help="auto, vllm or local (default: vllm where it is installed)")
    parser.add_argument("--device", help="local: cpu, cuda or cuda:N (default: CUDA where there is one)")
    parser.add_argument(
        "--dtype", default="auto", help="local: float32, bfloat16 or float16 (default: bfloat16 on CUDA, else float32)"
    )
    add_flags(parser.add_argument_group("server"), dataclasses.fields(ServerSettings), show_defaults=True)
    # show_defaults words the help; what was given has to be told from what was not
    parser.set_defaults(**{field.name: None for field in dataclasses.fields(ServerSettings)})
    return parser


def run(args: argparse.Namespace) -> int:
    """Check, then serve until the end."""
    if args.engine not in ENGINES:
        raise not_one_of("--engine", args.engine, ENGINES)
    extra = args.overrides[1:] if args.overrides[:1] == ["--"] else args.overrides
    if args.engine == "vllm" and not has_vllm():
        raise ValueError("--engine vllm: vLLM is not installed here; --engine local needs none")
    given = given_flags(args, dataclasses.fields(ServerSettings))
    settings = ServerSettings(**{**given, "api_key": key_from_environment(args.api_key)})
    check_checkpoint(args.model, args.dtype, block_diffusion=True)
    if args.engine == "vllm" or (args.engine == "auto" and has_vllm()):
        return start_vllm(args, settings, given, extra)
    if extra:
        raise ValueError(f"unknown argument {extra[0]!r}; only vLLM's server takes further ones, and --engine is local")
    check_installed()
    from nemo_bard.serving.server.run import serve

    serve(args.model, settings, device=args.device, dtype=args.dtype)
    return 0


def check_installed() -> None:
    """Raise ValueError if something that the local server needs is missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"the local server needs {', '.join(missing)}: pip install 'nemo-bard[serve]'")


def start_vllm(args: argparse.Namespace, settings: ServerSettings, given: dict[str, object], extra: list[str]) -> int:
    """Become vLLM's server.

    Raises:
        ValueError: For settings that only the local server has.
    """
    local = [name for name in given if name not in WITH_BOTH]
    if args.device is not None:
        local.append("device")
    if local:
        name = local[0].replace("_", "-")
        raise ValueError(
            f"--{name} is of the local server, and this is vLLM's (--engine local, or vLLM's own behind --)"
        )
    adapters = adapter_names(args.model)
    if adapters:
        sys.stderr.write(
            f"{args.model}: vLLM does not serve its adapters ({', '.join(adapters)}); --engine local does, and `nemo-bard merge"
            f" {args.model}/adapters/{adapters[-1]} WHOLE` makes a checkpoint for vLLM\n"
        )
    dtype = [] if args.dtype == "auto" else ["--dtype", args.dtype]
    command = vllm_command(
        args.model,
        host=settings.host,
        port=settings.port,
        name=settings.served_model_name or args.model.resolve().name,
        allow_urls=settings.allow_urls,
        extra=[*dtype, *extra],
    )
    environment = dict(os.environ)
    if "max_pixels" in given:
        environment[PIXELS_VARIABLE] = str(settings.max_pixels)
    environment.setdefault(PIXELS_VARIABLE, str(settings.max_pixels))
    secret = f"VLLM_API_KEY=${KEY_VARIABLE} " if settings.api_key else ""
    limit = shlex.quote(f"{PIXELS_VARIABLE}={environment[PIXELS_VARIABLE]}")
    sys.stderr.write(f"{secret}{limit} {shlex.join(command)}\n")
    sys.stderr.flush()
    if settings.api_key:
        environment["VLLM_API_KEY"] = settings.api_key  # not among the arguments, which all users of a machine see
    os.execve(command[0], command, environment)
