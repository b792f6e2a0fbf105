"""The command line of lmms-eval for a checkpoint or a server, and what its run has left."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_bard.base.errors import RunError, one_line
from nemo_bard.evaluation.harness import MODEL_NAME

PUBLISHED: dict[str, str] = {
    "mmmu_val": "MMMU val",
    "mmmu_pro": "MMMU-Pro (its two parts)",
    "mme": "MME",
    "realworldqa": "RealWorldQA",
    "mmstar": "MMStar",
    "ai2d": "AI2D",
    "chartqa": "ChartQA",
}
"""Tasks of lmms-eval 0.7.3 for the seven benchmarks that Bard-VL's model card has numbers of."""
INSTALL = "pip install --no-deps -r constraints-lmms.txt"
"""Brings lmms-eval into an environment that has this package; the file lies in its repository, which says why so."""
REQUEST_SETTINGS = ("max_new_tokens", "temperature", "top_k", "top_p")
"""Decoding settings that tasks set themselves, so that ``--gen_kwargs`` has to say them."""
SERVER_SETTINGS = ("max_new_tokens", "temperature")
"""What lmms-eval's client sends to a server."""
FAILED = "[LMMS_EVAL_REQUEST_FAILED"
"""How lmms-eval's client begins an answer that it did not get, and that is then scored as one."""
_SERVER_TIMEOUT = 10


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be evaluated."""

    model: str | None
    """Checkpoint folder, or the served name; of a server None asks for it."""
    tasks: Sequence[str]
    output: Path
    server: str | None = None
    """Address of an OpenAI-compatible server, with or without ``/v1``."""
    batch_size: int = 1
    limit: int | None = None
    device: str | None = None
    dtype: str = "auto"
    decoding: Mapping[str, Any] = field(default_factory=dict)
    """Decoding settings by name."""
    extra: Sequence[str] = ()
    """Further arguments of lmms-eval, as they are."""


def build_command(plan: Plan) -> list[str]:
    """The arguments of the process that evaluates.

    Raises:
        ValueError: If a value cannot be said in lmms-eval's notation, or a server has not what it would take.
    """
    model_args = _server_args(plan) if plan.server else _checkpoint_args(plan)
    words = [sys.executable, "-m", "lmms_eval", "--model", "async_openai" if plan.server else MODEL_NAME]
    words += ["--model_args", _notation(model_args), "--tasks", ",".join(plan.tasks)]
    if not plan.server:
        words += ["--batch_size", str(plan.batch_size)]
    of_requests = {name: plan.decoding[name] for name in REQUEST_SETTINGS if name in plan.decoding}
    if of_requests.get("temperature"):
        of_requests["do_sample"] = True
    if of_requests:
        words += ["--gen_kwargs", _notation(of_requests)]
    if plan.limit is not None:
        words += ["--limit", str(plan.limit)]
    words += ["--output_path", str(plan.output)]
    if plan.server and "--log_samples" not in plan.extra:
        words.append("--log_samples")
    return [*words, *plan.extra]


def _checkpoint_args(plan: Plan) -> dict[str, Any]:
    args = {"pretrained": plan.model, "dtype": plan.dtype}
    if plan.device is not None:
        args["device"] = plan.device
    return args | {name: value for name, value in plan.decoding.items() if name not in REQUEST_SETTINGS}


def _server_args(plan: Plan) -> dict[str, Any]:
    for name in plan.decoding:
        if name not in SERVER_SETTINGS:
            raise ValueError(f"{name} cannot be sent by lmms-eval's client; set it as a default of the server")
    assert plan.server is not None
    base = plan.server.rstrip("/")
    base = base if base.endswith("/v1") else f"{base}/v1"
    args = {"base_url": base, "model": plan.model or served_name(base), "num_cpus": plan.batch_size}
    if "OPENAI_API_KEY" not in os.environ:
        args["api_key"] = "none"  # the client wants one, whether or not the server does
    return args


def served_name(base: str) -> str:
    """Name of the only model of a server.

    Args:
        base: Address, up to ``/v1``.

    Raises:
        ValueError: If it does not answer, or has none or several.
    """
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        request = urllib.request.Request(f"{base}/models", headers=headers)
        with urllib.request.urlopen(request, timeout=_SERVER_TIMEOUT) as answer:
            names = [str(entry["id"]) for entry in json.load(answer)["data"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"server {base} does not list its models at /models ({one_line(error)})") from error
    if len(names) != 1:
        raise ValueError(f"server {base} has {len(names)} models ({', '.join(names)}); name one with --model")
    return names[0]


def _notation(values: Mapping[str, Any]) -> str:
    """``key=value,key=value`` as lmms-eval splits it.

    Raises:
        ValueError: For a value with a character that would split it, or be split off.
    """
    words = []
    for name, value in values.items():
        text = str(value)
        if isinstance(value, (list, tuple)):
            text = f"[{','.join(map(str, value))}]"
        elif any(sign in text for sign in ",'\"[]{}") or text != text.strip():
            raise ValueError(
                f"{name} {text!r} cannot be written as an argument of lmms-eval: it holds , ' \" [ ] {{ or }}"
            )
        words.append(f"{name}={text}")
    return ",".join(words)


def check_installed() -> None:
    """Raise ValueError, with the command that installs it, where lmms-eval is not."""
    if importlib.util.find_spec("lmms_eval") is None:
        raise ValueError(f"lmms-eval is not installed here; run `{INSTALL}`")


def find_results(output: Path) -> set[Path]:
    """Files of results below a folder."""
    return set(output.rglob("*_results.json")) if output.is_dir() else set()


def check_results(output: Path, before: set[Path], exit_code: int) -> Path:
    """The file of results that a run has written: lmms-eval 0.7 ends with exit code 0 whatever went wrong.

    Args:
        output: Folder of the run.
        before: What ``find_results`` found before it.
        exit_code: Of the process.

    Raises:
        RunError: If there is none, or answers in it are those of requests that failed.
    """
    new = sorted(find_results(output) - before, key=lambda path: path.stat().st_mtime)
    if exit_code or not new:
        raise RunError(f"lmms-eval ended without results (exit code {exit_code}); its messages are above")
    started = new[-1].name.removesuffix("_results.json")
    for file in sorted(new[-1].parent.glob(f"{started}_samples_*.jsonl")):
        failed = file.read_text(encoding="utf-8").count(FAILED)
        if failed:
            raise RunError(f"{file}: the server did not answer some requests; they are scored as wrong answers")
    return new[-1]
