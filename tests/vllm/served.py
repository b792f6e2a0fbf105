"""A trained checkpoint, what ``model.generate`` answers with it, and vLLM's server in front of it."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIMS = Path(__file__).parent / "cpu_shims"
START_SECONDS = 240
SMALL = (
    "order=[tiny,source,start,pbm_b8,pbm_b32]",
    *(f"stage.{name}.max_steps={steps}" for name, steps in (("source", 250), ("pbm_b8", 80), ("pbm_b32", 30))),
    *(f"stage.{name}.{key}_batch_size=8" for name in ("source", "pbm_b8", "pbm_b32") for key in ("global", "local")),
    *(f"stage.{name}.warmup_steps=3" for name in ("source", "pbm_b8", "pbm_b32")),
    *(f"stage.{name}.evaluate=false" for name in ("source", "pbm_b8", "pbm_b32")),
    "data.num_samples=2100",
)
"""Overrides of ``bard_tiny``: no reader of digits, but answers that are not random either, in less than two minutes."""
SETTINGS: dict[str, Any] = {"confidence_threshold": 0.9}
MAX_TOKENS = 64
LONG = "Read the digits of the picture above row by row, from the left to the right. " * 10


def vllm_python() -> str:
    """The interpreter of the environment with vLLM; skips the test where there is none."""
    python = os.environ.get("VLLM_PYTHON") or str(ROOT / ".venv-vllm/bin/python")
    if not Path(python).is_file():
        pytest.skip(f"no vLLM: {python} is not there (make venv-vllm, or VLLM_PYTHON=...)")
    return python


def environment() -> dict[str, str]:
    """Of processes of that environment, with this checkout; the shims are for a machine without a GPU."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(SHIMS)]),
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }


def trained_run(folder: Path) -> Path:
    """The run folder named by ``VLLM_RUN``, else a small chain that is trained into ``folder``."""
    if os.environ.get("VLLM_RUN"):
        return Path(os.environ["VLLM_RUN"])
    words = ["-m", "nemo_bard.cli", "finetune", "--config", "bard_tiny", f"run_dir={folder}", *SMALL]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, cwd=ROOT, env=quiet)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


def references(checkpoint: Path, count: int) -> list[dict[str, Any]]:
    """Pictures of digits as data URLs, questions, and the ids and texts that ``model.generate`` answers alone.

    Every sixth question is long enough to fill a block of vLLM's cache. Every second answer is drawn with a seed of its
    own, so that it is one that nobody else has, however little the model has learned.
    """

    from nemo_bard.data.digits import make_digits
    from nemo_bard.evaluation.responder import load_checkpoint

    model, processor = load_checkpoint(checkpoint, device="cpu")
    data, found = make_digits("test", count, rows=4, columns=4), []
    for index in range(count):
        picture, question = data[index]["conversation"][0]["content"]
        picture["image"].save(stream := io.BytesIO(), "png")
        text = question["text"] if index % 6 else LONG + question["text"]
        turn = {"role": "user", "content": [picture, {"type": "text", "text": text}]}
        asked = {"temperature": 1.0, "seed": index} if index % 2 else {}
        found.append(
            {
                "url": data_url("image/png", stream.getvalue()),
                "question": text,
                "sampling": asked,
                **answer(model, processor, turn, **asked),
            }
        )
    return found


def clip_references(checkpoint: Path, folder: Path) -> list[dict[str, Any]]:
    """As ``references``, for the files of ``videos.CLIPS``, which are written into a folder."""
    import videos

    from nemo_bard.data.digits import make_digits
    from nemo_bard.evaluation.responder import load_checkpoint

    model, processor = load_checkpoint(checkpoint, device="cpu")
    parts = [row["conversation"][0]["content"] for row in make_digits("test", 12, rows=4, columns=4)]
    question, found = parts[0][1]["text"], []
    for path in videos.write_clips(folder, [picture["image"].convert("RGB") for picture, _ in parts]):
        turn = {"role": "user", "content": [{"type": "video", "video": str(path)}, {"type": "text", "text": question}]}
        url = data_url("video/mp4", path.read_bytes())
        found.append({"url": url, "question": question, "sampling": {}, **answer(model, processor, turn)})
    return found


def data_url(mime: str, data: bytes) -> str:
    """A data URL."""
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def answer(model: Any, processor: Any, turn: dict[str, Any], *, seed: int | None = None, **more: Any) -> dict[str, Any]:
    """The ids and the text that ``model.generate`` answers to a turn, and the ids of the prompt."""
    import torch

    from nemo_bard.data.encode import encode_prompts

    batch = encode_prompts(processor, [[turn]])
    drawn = {} if seed is None else {"generator": torch.Generator().manual_seed(seed)}
    out = model.generate(batch, max_new_tokens=MAX_TOKENS, **SETTINGS, **more, **drawn, return_dict_in_generate=True)
    ids = out.sequences[0, : int(out.lengths[0])].tolist()
    text = processor.tokenizer.decode(ids, skip_special_tokens=True)
    return {"ids": ids, "text": text, "prompt_ids": batch["input_ids"][0].tolist()}


@contextmanager
def serving(python: str, checkpoint: Path, log: Path, *arguments: str) -> Iterator[str]:
    """vLLM's server in a process group of its own; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint), "--served-model-name", "bard"]
    words += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    words += ["--max-model-len", "1024", "--max-num-seqs", "8", "--max-num-batched-tokens", "1024"]
    words += ["--limit-mm-per-prompt", json.dumps({"image": 2, "video": 1}), *arguments]
    with log.open("w") as stream:
        process = subprocess.Popen(
            [python, *words], stdout=stream, stderr=stream, env=environment(), cwd=log.parent, start_new_session=True
        )
        try:
            wait_for(port, process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            for sign in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, sign)
                    process.wait(20)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue


def wait_for(port: int, process: subprocess.Popen, log: Path) -> None:
    """Return once the server answers."""
    from http.client import HTTPConnection

    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, f"the server has ended: {log.read_text()[-3000:]}"
        try:
            connection = HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"the server does not answer: {log.read_text()[-3000:]}")
